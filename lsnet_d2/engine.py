"""The trainer: Detectron2's, with our mapper, checks, checkpoints and gradient clipping."""

import argparse
import logging
import os
import weakref
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    create_ddp_model,
    default_setup,
)
from detectron2.engine.hooks import EvalHook, IterationTimer, LRScheduler, PeriodicWriter, PreciseBN
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from .checkpointer import AVERAGED, LSNetCheckpointer, require_plain_pickle
from .config_file import classes_key, load_config, num_classes, reporting_config_errors
from .data.annotation_checks import check_dataset_dicts
from .data.catalog import reporting_data_errors
from .data.dataset_mapper import LSNetDatasetMapper
from .data.train_loader import TrainingLoader, sampler_maker
from .errors import ConfigError, UserError
from .evaluation import build_evaluator
from .files import require_writable
from .hooks import (
    BestMetric,
    CheckpointOfAverage,
    TrainingCheckpointer,
    WeightAverage,
    WeightCheck,
    refuse_other_average,
)
from .modeling import LSNetWithTTA
from .modeling.test_time_augmentation import keep_image_sizes
from .seeding import STEP, seed_by
from .solver import build_optimizer, scale_schedule
from .stopping import StoppableTrainer
from .training_loop import LSNetTrainLoop, amp_dtype
from .validation_loss import (
    ValidationLoader,
    loss_normalizers,
    set_loss_normalizers,
    validation_losses,
    validation_mapper,
)

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> CfgNode:
    """Config, log files and random seeds of a run.

    Args:
        args: of ``detectron2.engine.default_argument_parser``.

    Returns:
        The frozen config, with a device that exists and the schedule of its batch
        (:func:`lsnet_d2.solver.scale_schedule`).

    Raises:
        ConfigError: see :func:`lsnet_d2.config_file.load_config`.
        UserError: nothing can be written into ``OUTPUT_DIR``.
    """
    cfg = load_config(args.config_file, args.opts)
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: {error.strerror}") from error
    require_writable(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="lsnet_d2")
    scale_schedule(cfg, given=args.opts[::2])
    cfg.freeze()
    default_setup(cfg, args)
    logger.info("Running on device %s", cfg.MODEL.DEVICE)
    return cfg


def build_mapper(cfg: CfgNode, is_train: bool) -> Callable[[dict], dict | None]:
    """The dataset mapper that the meta-architecture of the config needs.

    Raises:
        ConfigError: the model has keypoints, and a data set to train on has none.
    """
    if cfg.MODEL.KEYPOINT_ON and is_train:
        for name in cfg.DATASETS.TRAIN:
            if not MetadataCatalog.get(name).get("keypoint_names"):
                raise ConfigError(
                    f"MODEL.KEYPOINT_ON is True, but the metadata of {name} have no keypoint_names"
                )
    elif cfg.MODEL.KEYPOINT_ON:
        # Detectron2's mapper asks for the keypoints of DATASETS.TRAIN, which need not be here.
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.KEYPOINT_ON = False
    mapper = LSNetDatasetMapper if cfg.MODEL.META_ARCHITECTURE == "LSNet" else DatasetMapper
    return mapper(cfg, is_train)


def load_training_data(cfg: CfgNode) -> list[dict]:
    """The dataset dicts of ``DATASETS.TRAIN``, filtered as Detectron2 does it, and checked.

    Raises:
        UserError: a file is missing or broken, or no object is left to learn.
        AnnotationError: see :func:`lsnet_d2.data.annotation_checks.check_dataset_dicts`.
    """
    names = list(cfg.DATASETS.TRAIN)
    if not names:
        raise ConfigError("DATASETS.TRAIN is empty")
    check_proposals(cfg)
    with reporting_data_errors(names):
        dicts = get_detection_dataset_dicts(
            names,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
            if cfg.MODEL.KEYPOINT_ON
            else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    checked = check_dataset_dicts(
        dicts,
        num_classes=num_classes(cfg),
        dataset_name=names,
        num_classes_key=classes_key(cfg),
        on_invalid=cfg.DATASETS.INVALID_ANNOTATIONS,
        need_extreme_points=cfg.INPUT.EXTREME_POINTS == "annotation",
    )
    if checked is dicts:
        return dicts
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        checked = filter_images_with_only_crowd_annotations(checked)
    if not any(record["annotations"] for record in checked):
        raise UserError(
            f"data set {', '.join(names)}: no annotation is left without those that were dropped "
            "(DATASETS.INVALID_ANNOTATIONS is 'drop')"
        )
    return checked


def check_proposals(cfg: CfgNode) -> None:
    """
    Raises:
        CheckpointError: a file of proposals, which Detectron2 unpickles, holds more than data.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        for file in (*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST):
            require_plain_pickle(file)


def check_test_data(cfg: CfgNode, name: str) -> None:
    """Find what would stop the evaluation on a data set, before hours of training.

    Raises:
        UserError: a file of annotations is missing or broken.
        AnnotationError: the number of classes is not the config's, or image files are missing.
    """
    with reporting_data_errors([name]):
        dicts = get_detection_dataset_dicts([name], filter_empty=False)
    check_dataset_dicts(
        [{"file_name": record["file_name"]} for record in dicts],
        num_classes=num_classes(cfg),
        dataset_name=name,
        num_classes_key=classes_key(cfg),
    )


def load_validation_data(cfg: CfgNode, name: str) -> list[dict]:
    """The dataset dicts of a data set whose losses are computed, checked like those to learn from.

    Raises:
        UserError, AnnotationError: see :func:`load_training_data`.
    """
    with reporting_data_errors([name]):
        dicts = get_detection_dataset_dicts([name], filter_empty=False)
    return check_dataset_dicts(
        dicts,
        num_classes=num_classes(cfg),
        dataset_name=name,
        num_classes_key=classes_key(cfg),
        on_invalid=cfg.DATASETS.INVALID_ANNOTATIONS,
        need_extreme_points=cfg.INPUT.EXTREME_POINTS == "annotation",
    )


class LSNetTrainer(DefaultTrainer, StoppableTrainer):
    """Trains LSNet and Detectron2's own meta-architectures, on GPUs or CPUs.

    What differs from :class:`DefaultTrainer`: annotations, and the data and the evaluator of each
    test set, are checked before training; the checkpointer is :class:`LSNetCheckpointer`;
    gradients can be clipped as a whole (``SOLVER.CLIP_GRADIENTS.CLIP_TYPE: "full_model"``), and
    accumulated (``SOLVER.ACCUMULATION_STEPS``); mixed precision and several processes work on CPUs
    too. With ``TEST.AUG.ENABLED`` the last evaluation is followed by one with test-time
    augmentation. There are averaged weights (``SOLVER.EMA``), validation losses
    (``TEST.VALIDATION_LOSS``), and an end for want of progress (``TEST.PATIENCE``).

    A training that is resumed computes what it would have computed without the interruption. The
    random numbers of an iteration depend on the seed, the iteration and the process alone, those of
    the data see :class:`lsnet_d2.data.train_loader.TrainingLoader`; what else there is of state is
    in the checkpoints, and the seed too.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: as :func:`setup` returns it.
        """
        # The steps are DefaultTrainer's; it has no place to put another wrapper or checkpointer.
        super(DefaultTrainer, self).__init__()
        cfg = with_seed(self.auto_scale_workers(cfg, comm.get_world_size()))
        self.seed = cfg.SEED
        check_batch(cfg)
        data_loader = self.build_train_loader(cfg)
        for name in cfg.DATASETS.TEST:
            check_test_data(cfg, name)
            self.build_evaluator(cfg, name)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        ema = cfg.SOLVER.EMA
        self._average = WeightAverage(model, ema.DECAY) if ema.ENABLED else None
        model = wrap_distributed(model)
        self._trainer = LSNetTrainLoop(
            model,
            data_loader,
            optimizer,
            amp_dtype=amp_dtype(cfg),
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        average = self._average
        self.checkpointer = LSNetCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            cfg=cfg,
            averaged=average and average.averaged,
            trainer=weakref.proxy(self),
            **({"average": CheckpointOfAverage(average)} if average else {}),
        )
        self.start_iter = 0
        self._evaluated: int | None = None  # iterations before the last evaluation
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last whole checkpoint in ``OUTPUT_DIR``, or load ``MODEL.WEIGHTS``.

        The learning rate goes on too. Where the config has another one, for another batch perhaps,
        there is a warning.

        Raises:
            CheckpointError: see :meth:`LSNetCheckpointer.resume_or_load`.
        """
        planned = max(self.scheduler.base_lrs)
        rest = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        with_average = self.checkpointer.resumed_from and rest.get("weights") == AVERAGED
        if self._average and not with_average:
            self._average.start()
        if path := self.checkpointer.resumed_from:
            refuse_other_average(
                path, saved=rest.get("weights") == AVERAGED, wanted=self._average is not None
            )
            self.start_iter = self.iter + 1
            if (rate := max(self.scheduler.base_lrs)) != planned:
                logger.warning(
                    "Going on with the learning rate of the checkpoint, %g, not with %g, that of "
                    "the config: give the SOLVER.IMS_PER_BATCH and SOLVER.BASE_LR of its training",
                    rate,
                    planned,
                )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """
        Raises:
            ConfigError: the builders refuse the config.
        """
        with reporting_config_errors(cfg):
            return super().build_model(cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainingLoader:
        # Loading a data set enters its keypoints into the metadata, which the mapper reads.
        dataset = load_training_data(cfg)
        parts = cfg.SOLVER.ACCUMULATION_STEPS * comm.get_world_size()
        return TrainingLoader(
            dataset,
            build_mapper(cfg, is_train=True),
            sampler_maker(cfg, dataset),
            batch_size=cfg.SOLVER.IMS_PER_BATCH // parts,
            seed=with_seed(cfg).SEED,
            group_by_orientation=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        with reporting_data_errors([dataset_name]):
            return build_detection_test_loader(
                cfg, dataset_name, mapper=build_mapper(cfg, is_train=False)
            )

    @property
    def evaluated_model(self) -> nn.Module:
        """The one with averaged weights, where there is one."""
        return self._average.averaged if self._average else self.model

    def run_step(self) -> None:
        seed_by(self.seed, STEP, self.iter, comm.get_rank())
        super().run_step()

    def state_dict(self) -> dict:
        state = super().state_dict()
        # the last one that is done; hooks that save at the end are called when none is at hand
        state["iteration"] = min(self.iter, self.max_iter - 1)
        state["seed"] = self.seed
        state["loss_normalizers"] = loss_normalizers(self.checkpointer.model)
        if isinstance(self.data_loader, TrainingLoader):
            batches = (state["iteration"] + 1) * self.cfg.SOLVER.ACCUMULATION_STEPS
            state["data_loader"] = self.data_loader.state_dict(batches)
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if "seed" not in state_dict:
            logger.warning("An older checkpoint: the order of the images starts anew")
            return
        if self.seed != state_dict["seed"]:
            logger.info("Going on with the seed of the checkpoint, %d", state_dict["seed"])
        self.seed = state_dict["seed"]
        set_loss_normalizers(self.checkpointer.model, state_dict["loss_normalizers"])
        if isinstance(self.data_loader, TrainingLoader) and "data_loader" in state_dict:
            self.data_loader.load_state_dict(state_dict["data_loader"])

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, in its order; but checkpoints know what was found of the best metric, and
        are written after the evaluation if there is one."""
        cfg = self.cfg
        period = cfg.TEST.EVAL_PERIOD
        checkpoint = (
            [TrainingCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)]
            if comm.is_main_process()
            else []
        )
        evaluation = [EvalHook(period, self._evaluate)]
        if cfg.TEST.VALIDATION_LOSS:
            evaluation.append(EvalHook(period, self.build_validation()))
        if cfg.TEST.AUG.ENABLED:
            evaluation.append(EvalHook(0, lambda: self.test_with_TTA(cfg, self.evaluated_model)))
        if cfg.TEST.BEST_METRIC:
            evaluation.append(
                BestMetric(
                    self.checkpointer,
                    cfg.TEST.BEST_METRIC,
                    period=period,
                    mode=cfg.TEST.BEST_MODE,
                    patience=cfg.TEST.PATIENCE,
                )
            )
        return [
            IterationTimer(),
            LRScheduler(),
            *self._precise_bn(),
            *([self._average] if self._average else []),
            WeightCheck((cfg.SOLVER.CHECKPOINT_PERIOD, period)),
            *([*evaluation, *checkpoint] if cfg.TEST.BEST_METRIC else [*checkpoint, *evaluation]),
            *([PeriodicWriter(self.build_writers())] if comm.is_main_process() else []),
        ]

    def _precise_bn(self) -> list[HookBase]:
        test = self.cfg.TEST
        if not test.PRECISE_BN.ENABLED or not get_bn_modules(self.model):
            return []
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # saves memory, as in Detectron2
        loader = self.build_train_loader(cfg)
        return [PreciseBN(test.EVAL_PERIOD, self.model, loader, test.PRECISE_BN.NUM_ITER)]

    def _evaluate(self) -> dict:
        """The results of now; those that are there when an early end has just been decided."""
        done = min(self.iter + 1, self.max_iter)
        if self._evaluated != done:
            if self._average:
                logger.info("Evaluating the averaged weights (SOLVER.EMA)")
            self._last_eval_results = self.test(self.cfg, self.evaluated_model)
            self._evaluated = done
        return self._last_eval_results

    def build_validation(self) -> Callable[[], dict]:
        """What computes the losses of ``DATASETS.TEST``: of each data set under its name if there
        are several.

        Raises:
            UserError: see :func:`load_validation_data`.
        """
        cfg = self.cfg
        mapper = validation_mapper(type(build_mapper(cfg, is_train=True)), cfg)
        parts = comm.get_world_size() * cfg.SOLVER.ACCUMULATION_STEPS
        loaders = {
            name: ValidationLoader(
                load_validation_data(cfg, name),
                mapper,
                batch_size=cfg.SOLVER.IMS_PER_BATCH // parts,
                num_workers=cfg.DATALOADER.NUM_WORKERS,
            )
            for name in cfg.DATASETS.TEST
        }

        def compute() -> dict:
            model = getattr(self.evaluated_model, "module", self.evaluated_model)
            set_loss_normalizers(model, loss_normalizers(self.checkpointer.model))
            found = {
                n: validation_losses(model, loader, self.seed) for n, loader in loaders.items()
            }
            return {"validation": found if len(found) > 1 else next(iter(found.values()))}

        return compute

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            folder = os.path.join(folder, dataset_name)
        with reporting_data_errors([dataset_name]):
            return build_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict:  # noqa: N802 (Detectron2's)
        """Results with test-time augmentation, under the names of :meth:`test` and "_TTA".

        Files are written to ``inference_TTA``. Of models, LSNet has it.
        """
        logger.info("Running inference with test-time augmentation ...")
        model = LSNetWithTTA(cfg, model)
        cfg = keep_image_sizes(cfg)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, model, evaluators)
        return {f"{name}_TTA": result for name, result in results.items()}

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """
        Raises:
            ConfigError: see :func:`lsnet_d2.solver.build_optimizer`.
        """
        with reporting_config_errors(cfg):
            return build_optimizer(cfg, model)


def with_seed(cfg: CfgNode) -> CfgNode:
    """The config with a seed, drawn where it has none; the same in all processes."""
    if cfg.SEED >= 0:
        return cfg
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.SEED = comm.shared_random_seed()
    if frozen:
        cfg.freeze()
    return cfg


def check_batch(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: a batch cannot be divided among the processes and the parts of a step.
    """
    steps, processes = cfg.SOLVER.ACCUMULATION_STEPS, comm.get_world_size()
    if steps < 1:
        raise ConfigError(f"SOLVER.ACCUMULATION_STEPS is {steps}; it must be positive")
    if cfg.SOLVER.IMS_PER_BATCH % (steps * processes):
        parts = f"the number of processes, {processes}"
        if steps > 1:
            parts += f", times SOLVER.ACCUMULATION_STEPS, {steps}"
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a multiple of {parts}"
        )


def wrap_distributed(model: nn.Module) -> nn.Module:
    """Data-parallel training where there are several processes, on the device of the model."""
    device = next(model.parameters()).device
    device_ids = [comm.get_local_rank()] if device.type == "cuda" else None
    return create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)


def evaluate(cfg: CfgNode) -> dict:
    """Results of ``MODEL.WEIGHTS`` on ``DATASETS.TEST``; with ``TEST.AUG.ENABLED`` also those of
    :meth:`LSNetTrainer.test_with_TTA`.

    Raises:
        CheckpointError: the weights are missing or not those of this model.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty")
    check_proposals(cfg)
    model = LSNetTrainer.build_model(cfg)
    checkpointer = LSNetCheckpointer(model, cfg=cfg)
    checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[], strict=True)
    results = LSNetTrainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(LSNetTrainer.test_with_TTA(cfg, model))
    return results
