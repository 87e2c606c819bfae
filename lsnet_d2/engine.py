"""The trainer: Detectron2's, with our mapper, checks, checkpoints and gradient clipping."""

import logging
import os
import weakref
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook, IterationTimer, LRScheduler, PeriodicWriter, PreciseBN
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from .checkpointer import AVERAGED, LSNetCheckpointer
from .config_file import reporting_config_errors
from .data.catalog import reporting_data_errors
from .data.train_loader import TrainingLoader
from .description import describe_model
from .errors import CheckpointError, ConfigError
from .evaluation import build_evaluator
from .hooks import (
    BestMetric,
    CheckpointOfAverage,
    TrainingCheckpointer,
    WeightAverage,
    WeightCheck,
    refuse_other_average,
)
from .loaders import (
    build_test_loader,
    build_train_loader,
    build_validation_loaders,
    check_batch,
    check_proposals,
    check_test_data,
)
from .modeling import LSNetWithTTA
from .modeling.test_time_augmentation import keep_image_sizes
from .seeding import STEP, seed_by, with_seed
from .solver import build_optimizer
from .stopping import StoppableTrainer
from .training_loop import LSNetTrainLoop, amp_dtype, wrap_distributed
from .validation_loss import loss_normalizers, set_loss_normalizers, validation_losses

logger = logging.getLogger(__name__)


class LSNetTrainer(DefaultTrainer, StoppableTrainer):
    """Trains LSNet and Detectron2's own meta-architectures, on GPUs or CPUs.

    What differs from :class:`DefaultTrainer`: annotations, and the data and the evaluator of each
    test set, are checked before training; the checkpointer is :class:`LSNetCheckpointer`;
    gradients can be clipped as a whole (``SOLVER.CLIP_GRADIENTS.CLIP_TYPE: "full_model"``), and
    accumulated (``SOLVER.ACCUMULATION_STEPS``); mixed precision and several processes work on CPUs
    too. With ``TEST.AUG.ENABLED`` the last evaluation is followed by one with test-time
    augmentation. There are averaged weights (``SOLVER.EMA``), validation losses
    (``TEST.VALIDATION_LOSS``), and an end for want of progress (``TEST.PATIENCE``).

    A training in one process that is resumed computes what it would have computed without the
    interruption (docs/training.md has the limits). The random numbers of an iteration depend on the
    seed, the iteration and the process alone, those of the data see
    :class:`lsnet_d2.data.train_loader.TrainingLoader`; what else there is of state is in the
    checkpoints, and the seed too.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: as :func:`lsnet_d2.run_setup.setup` returns it.
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
            description=describe_model(cfg),
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
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_test_loader(cfg, dataset_name)

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
        if cfg.TEST.VALIDATION_LOSS and cfg.DATASETS.TEST:
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
            UserError: see :func:`lsnet_d2.loaders.load_validation_data`.
        """
        loaders = build_validation_loaders(self.cfg)

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


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict:
    """Results of ``MODEL.WEIGHTS`` on ``DATASETS.TEST``; with ``TEST.AUG.ENABLED`` also those of
    :meth:`LSNetTrainer.test_with_TTA`. They are compared with ``TEST.EXPECTED_RESULTS``.

    Args:
        resume: take the last checkpoint in ``OUTPUT_DIR`` instead.

    Raises:
        CheckpointError: the weights are missing or not those of this model.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty")
    check_proposals(cfg)
    model = LSNetTrainer.build_model(cfg)
    checkpointer = LSNetCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg)
    path = checkpointer.last_checkpoint(clean=False) if resume else cfg.MODEL.WEIGHTS
    if path is None:
        raise CheckpointError(f"--resume: there is no checkpoint in {cfg.OUTPUT_DIR}")
    checkpointer.load(path, checkpointables=[], strict=True)
    results = LSNetTrainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(LSNetTrainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results
