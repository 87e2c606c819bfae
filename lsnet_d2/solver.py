"""Optimizers: what Detectron2's solver lacks of them."""

from functools import partial

from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

WHOLE_GRADIENT = "full_model"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """The optimizer that the keys of ``SOLVER`` describe.

    With ``OPTIMIZER`` "SGD" and ``BACKBONE_MULTIPLIER`` 1 it is Detectron2's, but for
    ``CLIP_GRADIENTS.CLIP_TYPE`` "full_model", which clips the gradient of the model as a whole.
    "AdamW" has torch's betas; ``MOMENTUM`` and ``NESTEROV`` are SGD's.

    Raises:
        ValueError: the optimizer is unknown; the message names the key.
    """
    solver = cfg.SOLVER
    optimizers = {
        "SGD": partial(SGD, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV),
        "AdamW": AdamW,
    }
    if solver.OPTIMIZER not in optimizers:
        raise ValueError(
            f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; it must be one of {', '.join(optimizers)}"
        )
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lambda name: solver.BACKBONE_MULTIPLIER if _is_pretrained(name) else 1.0,
    )
    optimizer = optimizers[solver.OPTIMIZER](groups)
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == WHOLE_GRADIENT:
        clip_whole_gradient(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
        return optimizer
    return maybe_add_gradient_clipping(cfg, optimizer)


def _is_pretrained(name: str) -> bool:
    """Whether a parameter is one of the network under the pyramid, whose weights are imported."""
    return name.startswith("backbone.bottom_up.")


def clip_whole_gradient(optimizer: Optimizer, max_norm: float, norm_type: float = 2.0) -> None:
    """Before each step of ``optimizer``, scale all gradients so that their joint norm is at most
    ``max_norm``, as the released code does (with 35).

    It happens inside ``step``, that is, after a gradient scaler has taken its factor out.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_) -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip)
