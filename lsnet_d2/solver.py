"""Optimizers and schedules: what Detectron2's solver lacks of them."""

import logging
from collections.abc import Collection
from functools import partial

from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

logger = logging.getLogger(__name__)

WHOLE_GRADIENT = "full_model"
OPTIMIZERS = ("SGD", "AdamW")
# Keys that count iterations; 0 stands for never in the last.
ITERATION_KEYS = (
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
)
# The keys of a training that is not evaluated on the way, and so is not ended by it either.
NO_EVALUATIONS = {"TEST.EVAL_PERIOD": 0, "TEST.BEST_METRIC": "", "TEST.PATIENCE": 0}


def scale_schedule(cfg: CfgNode, given: Collection[str] = ()) -> None:
    """Fit the schedule to the size of the batch, in place, and log what changes.

    Where ``SOLVER.IMS_PER_BATCH`` is not ``SOLVER.REFERENCE_IMS_PER_BATCH``, all iterations are
    divided by their ratio, so that as many images are seen. The learning rate of SGD is multiplied
    by the ratio, the linear rule of "Accurate, Large Minibatch SGD" (arXiv 1706.02677), as in
    Detectron2's ``auto_scale_workers``; that of AdamW by the root of it, as in "On the SDEs and
    Scaling Rules for Adaptive Gradient Algorithms" (arXiv 2205.10287), whose momenta stay here. The
    reference then is the batch, so nothing is scaled twice.

    Args:
        cfg: a config that is not frozen. A reference of 0 leaves it as it is.
        given: keys to leave as they are, because someone has chosen their values for this batch.
    """
    solver = cfg.SOLVER
    batch, reference = solver.IMS_PER_BATCH, solver.REFERENCE_IMS_PER_BATCH
    if reference in (0, batch):
        return
    changes = {}
    factor = (batch / reference) ** (0.5 if solver.OPTIMIZER == "AdamW" else 1.0)
    for key in ("SOLVER.BASE_LR", "SOLVER.BASE_LR_END"):
        node, name = key.split(".")
        if key not in given and (old := cfg[node][name]):
            changes[key] = old, old * factor
    for key in ITERATION_KEYS:
        node, name = key.split(".")
        if key not in given and (old := cfg[node][name]):
            changes[key] = old, _divided(old, batch / reference)
    for key, (_, new) in changes.items():
        node, name = key.split(".")
        cfg[node][name] = new
    solver.REFERENCE_IMS_PER_BATCH = batch
    logger.info(
        "SOLVER.IMS_PER_BATCH is %d and the schedule is for %d (SOLVER.REFERENCE_IMS_PER_BATCH; 0 "
        "lets it be): %s",
        batch,
        reference,
        ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changes.items()) or "all given",
    )


def schedule_of_length(cfg: CfgNode, iterations: int) -> dict[str, int | tuple[int, ...]]:
    """Values of the keys that count iterations, for a training of another length.

    All are scaled in proportion to ``SOLVER.MAX_ITER``: a warm-up of a tenth stays one of a tenth.
    """
    values = {}
    for key in ITERATION_KEYS:
        node, name = key.split(".")
        if old := cfg[node][name]:
            values[key] = _divided(old, cfg.SOLVER.MAX_ITER / iterations)
    # Of very short trainings none may be left.
    steps = values.get("SOLVER.STEPS", ())
    if steps and cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        values["SOLVER.STEPS"] = tuple(sorted({step for step in steps if step < iterations}))
    return values


def _divided(iterations: int | tuple[int, ...], factor: float) -> int | tuple[int, ...]:
    if isinstance(iterations, int):
        return max(round(iterations / factor), 1)
    return tuple(max(round(step / factor), 1) for step in iterations)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """The optimizer that the keys of ``SOLVER`` describe.

    With ``OPTIMIZER`` "SGD" and ``BACKBONE_MULTIPLIER`` 1 it is Detectron2's, but for
    ``CLIP_GRADIENTS.CLIP_TYPE`` "full_model", which clips the gradient of the model as a whole.
    "AdamW" has torch's betas; ``MOMENTUM`` and ``NESTEROV`` are SGD's.

    Raises:
        ValueError: the optimizer is unknown; the message names the key.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        raise ValueError(
            f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; it must be one of {', '.join(OPTIMIZERS)}"
        )
    optimizers = {
        "SGD": partial(SGD, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV),
        "AdamW": partial(AdamW, fused=True),
    }
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=partial(_lr_factor, solver),
    )
    optimizer = optimizers[solver.OPTIMIZER](groups)
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == WHOLE_GRADIENT:
        clip_whole_gradient(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
        return optimizer
    return maybe_add_gradient_clipping(cfg, optimizer)


def _lr_factor(solver: CfgNode, name: str) -> float:
    """Of a parameter's learning rate. (Detectron2's ``bias_lr_factor`` would undo all others.)"""
    imported = name.startswith("backbone.bottom_up.")  # the network under the pyramid
    factor = solver.BACKBONE_MULTIPLIER if imported else 1.0
    if name.rpartition(".")[2] == "bias" and solver.BIAS_LR_FACTOR is not None:
        factor *= solver.BIAS_LR_FACTOR
    return factor


def clip_whole_gradient(optimizer: Optimizer, max_norm: float, norm_type: float = 2.0) -> None:
    """Before each step of ``optimizer``, scale all gradients so that their joint norm is at most
    ``max_norm``, as the released code does (with 35).

    It happens inside ``step``, that is, after a gradient scaler has taken its factor out.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_) -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip)
