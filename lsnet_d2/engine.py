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
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    create_ddp_model,
    default_setup,
)
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from .checkpointer import LSNetCheckpointer
from .config_file import classes_key, load_config, num_classes, reporting_config_errors
from .data.annotation_checks import check_dataset_dicts
from .data.catalog import reporting_data_errors
from .data.dataset_mapper import LSNetDatasetMapper
from .errors import ConfigError, UserError
from .evaluation import build_evaluator
from .modeling import LSNetWithTTA
from .modeling.test_time_augmentation import keep_image_sizes
from .solver import build_optimizer, scale_schedule
from .training_loop import LSNetTrainLoop, amp_dtype

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
    """
    cfg = load_config(args.config_file, args.opts)
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"OUTPUT_DIR {cfg.OUTPUT_DIR}: {error.strerror}") from error
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


class LSNetTrainer(DefaultTrainer):
    """Trains LSNet and Detectron2's own meta-architectures, on GPUs or CPUs.

    What differs from :class:`DefaultTrainer`: annotations, and the data and the evaluator of each
    test set, are checked before training; the checkpointer is :class:`LSNetCheckpointer`;
    gradients can be clipped as a whole (``SOLVER.CLIP_GRADIENTS.CLIP_TYPE: "full_model"``), and
    accumulated (``SOLVER.ACCUMULATION_STEPS``); mixed precision and several processes work on CPUs
    too. With ``TEST.AUG.ENABLED`` the last evaluation is followed
    by one with test-time augmentation.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: as :func:`setup` returns it.
        """
        # The steps are DefaultTrainer's; it has no place to put another wrapper or checkpointer.
        super(DefaultTrainer, self).__init__()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_batch(cfg)
        data_loader = self.build_train_loader(cfg)
        for name in cfg.DATASETS.TEST:
            check_test_data(cfg, name)
            self.build_evaluator(cfg, name)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        model = wrap_distributed(model)
        self._trainer = LSNetTrainLoop(
            model,
            data_loader,
            optimizer,
            amp_dtype=amp_dtype(cfg),
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = LSNetCheckpointer(
            model, cfg.OUTPUT_DIR, cfg=cfg, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
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
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed_from:
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
    def build_train_loader(cls, cfg: CfgNode):
        # Loading a data set enters its keypoints into the metadata, which the mapper reads.
        dataset = load_training_data(cfg)
        return build_detection_train_loader(
            cfg,
            mapper=build_mapper(cfg, is_train=True),
            dataset=dataset,
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATION_STEPS,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        with reporting_data_errors([dataset_name]):
            return build_detection_test_loader(
                cfg, dataset_name, mapper=build_mapper(cfg, is_train=False)
            )

    def build_hooks(self) -> list[HookBase]:
        registered = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED:
            # after the plain evaluation, and before the writer of what was found
            position = 1 + max(i for i, h in enumerate(registered) if isinstance(h, EvalHook))
            augmented = EvalHook(0, lambda: self.test_with_TTA(self.cfg, self.model))
            registered.insert(position, augmented)
        return registered

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
    model = LSNetTrainer.build_model(cfg)
    checkpointer = LSNetCheckpointer(model, cfg=cfg)
    checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[], strict=True)
    results = LSNetTrainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(LSNetTrainer.test_with_TTA(cfg, model))
    return results
