"""Res2Net, bottlenecks whose 3x3 convolution is a chain over splits of the channels.

Follows "Res2Net: A New Multi-scale Backbone Architecture" (arXiv 1904.01169) in the variant "v1d"
of the released code: a stem of three convolutions, and shortcuts that average before they project.
"""

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import ResNet
from torch import Tensor, nn

from .resnet import finish_resnet, norm_while_building

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _conv(in_channels: int, out_channels: int, size: int, norm: str, stride: int = 1) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        size,
        stride=stride,
        padding=size // 2,
        bias=False,
        norm=get_norm(norm, out_channels),
    )
    weight_init.c2_msra_fill(conv)
    return conv


class DeepStem(CNNBlockBase):
    """Three 3x3 convolutions and a max pooling, with stride 4 in all.

    Args:
        in_channels: of the image.
        out_channels: of the last convolution; the others have half of them.
        norm: a norm of Detectron2's.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm: str) -> None:
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = _conv(in_channels, out_channels // 2, 3, norm, stride=2)
        self.conv2 = _conv(out_channels // 2, out_channels // 2, 3, norm)
        self.conv3 = _conv(out_channels // 2, out_channels, 3, norm)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / 4, W / 4)."""
        x = image
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu_(conv(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class Res2NetBlock(CNNBlockBase):
    """A bottleneck that splits its channels and filters each split with the one before it.

    Args:
        in_channels, out_channels: of the block.
        width: channels of each split.
        scales: number of splits; the last one is not filtered.
        stride: of the 3x3 convolutions, and of the pooling of what bypasses them.
        chained: whether a split is added to the next one; not so in the first block of a stage.
        norm: a norm of Detectron2's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int,
        scales: int,
        stride: int,
        chained: bool,
        norm: str,
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.width = width
        self.chained = chained
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, 1, norm)
        self.conv1 = _conv(in_channels, width * scales, 1, norm)
        self.convs = nn.ModuleList(_conv(width, width, 3, norm, stride) for _ in range(scales - 1))
        self.conv3 = _conv(width * scales, out_channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride), rounded up."""
        *splits, last = F.relu_(self.conv1(x)).split(self.width, dim=1)
        outputs = []
        for conv, split in zip(self.convs, splits, strict=True):
            if self.chained and outputs:
                split = split + outputs[-1]
            outputs.append(F.relu_(conv(split)))
        if self.stride != 1:
            last = F.avg_pool2d(last, 3, stride=self.stride, padding=1)
        out = self.conv3(torch.cat([*outputs, last], dim=1))
        return F.relu_(out + self._identity(x))

    def _identity(self, x: Tensor) -> Tensor:
        if self.stride != 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return x if self.shortcut is None else self.shortcut(x)


def build_lsnet_res2net_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A Res2Net by ``MODEL.RESNETS``, where ``WIDTH_PER_GROUP`` is that of a split in res2, and
    ``MODEL.RES2NET``; with what :func:`~.resnet.finish_resnet` adds.

    Raises:
        ValueError: a key has a value that Res2Net does not have; the message names it.
    """
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in _BLOCKS:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}; for Res2Net it must be one of "
            f"{', '.join(map(str, _BLOCKS))}"
        )
    if cfg.MODEL.RES2NET.SCALES < 2:
        raise ValueError(
            f"MODEL.RES2NET.SCALES is {cfg.MODEL.RES2NET.SCALES}; it must be 2 or more"
        )
    for key, value in (("NUM_GROUPS", 1), ("STRIDE_IN_1X1", False), ("RES5_DILATION", 1)):
        if resnets[key] != value:
            raise ValueError(
                f"MODEL.RESNETS.{key} is {resnets[key]}; for Res2Net it must be {value}"
            )
    norm = norm_while_building(cfg)
    in_channels = resnets.STEM_OUT_CHANNELS
    stem = DeepStem(input_shape.channels, in_channels, norm=norm)
    stages = []
    for i, num_blocks in enumerate(_BLOCKS[resnets.DEPTH]):
        others = num_blocks - 1
        out_channels = resnets.RES2_OUT_CHANNELS * 2**i
        stages.append(
            ResNet.make_stage(
                Res2NetBlock,
                num_blocks,
                in_channels=in_channels,
                out_channels=out_channels,
                width=resnets.WIDTH_PER_GROUP * 2**i,
                scales=cfg.MODEL.RES2NET.SCALES,
                stride_per_block=[1 if i == 0 else 2] + [1] * others,
                chained_per_block=[False] + [True] * others,
                norm=norm,
            )
        )
        in_channels = out_channels
    return finish_resnet(ResNet(stem, stages, out_features=resnets.OUT_FEATURES), cfg)
