"""Detectron2's ResNets and ResNeXts with LSNet's batch norm and deformable convolutions."""

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.backbone import ResNet, build_resnet_backbone
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers import FixedBatchNorm2d, ModulatedDeformConv, conv_norm

FIXED_NORM = "FixedBN"
_STAGES = 5  # the stem is the first


def build_lsnet_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet or ResNeXt by ``MODEL.RESNETS``; see :func:`finish_resnet` for what we add."""
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.RESNETS.NORM = norm_while_building(cfg)
    plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * (_STAGES - 1)
    plain.MODEL.BACKBONE.FREEZE_AT = 0
    return finish_resnet(build_resnet_backbone(plain, input_shape), cfg)


def norm_while_building(cfg: CfgNode) -> str:
    """The norm of ``MODEL.RESNETS.NORM``, or the one that :func:`finish_resnet` exchanges."""
    norm = cfg.MODEL.RESNETS.NORM
    return "BN" if norm == FIXED_NORM else norm


def finish_resnet(backbone: ResNet, cfg: CfgNode) -> ResNet:
    """What LSNet's ResNets have beyond Detectron2's, in place.

    - With ``MODEL.RESNETS.NORM`` "FixedBN" the statistics of batch norm are fixed everywhere, its
      weight and bias only in the stages that ``MODEL.BACKBONE.FREEZE_AT`` freezes.
    - In the stages of ``MODEL.RESNETS.DEFORM_ON_PER_STAGE`` every 3x3 convolution is a modulated
      deformable one, on any device, with offsets predicted by its own ``conv_offset``.
    - With ``MODEL.RESNETS.ACTIVATION_CHECKPOINTING`` only the inputs of blocks are kept for the
      backward pass.

    Args:
        backbone: with :func:`norm_while_building` for its norm, nothing frozen or deformable.

    Raises:
        ValueError: a key has a value that is not supported; the message names it.
    """
    resnets, freeze_at = cfg.MODEL.RESNETS, cfg.MODEL.BACKBONE.FREEZE_AT
    if not 0 <= freeze_at <= _STAGES:
        raise ValueError(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; it must be 0 to {_STAGES}")
    _check_deform(cfg)
    for stage, deform in zip(backbone.stages, resnets.DEFORM_ON_PER_STAGE, strict=False):
        if deform:
            _make_deformable(stage)
    if resnets.NORM == FIXED_NORM:
        FixedBatchNorm2d.convert(backbone)
        _fold_norms(backbone)
        # backbone.freeze would exchange the norms, and checkpoints lose these parameters
        for module in [backbone.stem, *backbone.stages][:freeze_at]:
            module.requires_grad_(False)
    else:
        backbone.freeze(freeze_at)
    if resnets.ACTIVATION_CHECKPOINTING:
        if any(_gathers_statistics(m) for stage in backbone.stages for m in stage.modules()):
            raise ValueError(
                f"MODEL.RESNETS.ACTIVATION_CHECKPOINTING is True and MODEL.RESNETS.NORM is "
                f"{resnets.NORM!r}, which would count each batch twice in its statistics"
            )
        for i, name in enumerate(backbone.stage_names):
            backbone.stages[i] = RecomputedStage(*backbone.stages[i])
            setattr(backbone, name, backbone.stages[i])
    return backbone


def _gathers_statistics(module: nn.Module) -> bool:
    batch_norm = isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
    return batch_norm and not isinstance(module, FixedBatchNorm2d)


def _check_deform(cfg: CfgNode) -> None:
    resnets = cfg.MODEL.RESNETS
    if len(resnets.DEFORM_ON_PER_STAGE) != _STAGES - 1:
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {list(resnets.DEFORM_ON_PER_STAGE)}; it must "
            f"have {_STAGES - 1} values, for res2 to res5"
        )
    if not any(resnets.DEFORM_ON_PER_STAGE):
        return
    for key, value in (
        ("DEFORM_MODULATED", True),
        ("DEFORM_NUM_GROUPS", 1),
        ("RES5_DILATION", 1),
    ):
        if resnets[key] != value:
            raise ValueError(
                f"MODEL.RESNETS.{key} is {resnets[key]}; with DEFORM_ON_PER_STAGE it must be "
                f"{value}"
            )


def _make_deformable(stage: nn.Module) -> None:
    """Exchange the 3x3 convolutions; weights and norms stay."""
    for name, conv in list(stage.named_modules()):
        if isinstance(conv, Conv2d) and conv.kernel_size == (3, 3):
            deformable = ModulatedDeformConv(
                conv.in_channels,
                conv.out_channels,
                stride=conv.stride[0],
                groups=conv.groups,
                bias=conv.bias is not None,
                norm=conv.norm,
            )
            deformable.weight, deformable.bias = conv.weight, conv.bias
            stage.set_submodule(name, deformable)


class FoldedConv2d(Conv2d):
    """Detectron2's convolution, with a :class:`FixedBatchNorm2d` folded into it at each call."""

    def forward(self, x: Tensor) -> Tensor:
        x = conv_norm(x, self, self.norm)
        return x if self.activation is None else self.activation(x)


def _fold_norms(backbone: nn.Module) -> None:
    for name, conv in list(backbone.named_modules()):
        if isinstance(conv, Conv2d) and isinstance(conv.norm, FixedBatchNorm2d):
            folded = FoldedConv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                bias=conv.bias is not None,
                norm=conv.norm,
                activation=conv.activation,
            )
            folded.weight, folded.bias = conv.weight, conv.bias
            backbone.set_submodule(name, folded)


class RecomputedStage(nn.Sequential):
    """Blocks that keep their inputs only, and are computed anew in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        for block in self:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        return x
