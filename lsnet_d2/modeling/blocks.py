"""Layers that the head, its corner verification and the third stage are made of."""

import math

from torch import Tensor, nn

from ..layers import ModulatedDeformConv

GROUPS = 32


def same_conv(
    in_channels: int, out_channels: int, kernel_size: int, *, bias: bool = True
) -> nn.Conv2d:
    """Same-size convolution with the head's initialisation."""
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, padding=(kernel_size - 1) // 2, bias=bias
    )
    nn.init.normal_(conv.weight, std=0.01)
    if bias:
        nn.init.zeros_(conv.bias)
    return conv


def set_prior(layer: nn.Conv2d | nn.Linear, prob: float) -> None:
    """Let scores start at ``prob``: the focal loss expects rare objects."""
    nn.init.constant_(layer.bias, -math.log((1 - prob) / prob))


class ConvNormAct(nn.Sequential):
    """Same-size convolution, plain or deformable, with GroupNorm and ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, kind: str = "conv"
    ) -> None:
        """
        Args:
            out_channels: a multiple of 32, the groups of the norm.
            kind: "conv" or "dcn".

        Raises:
            ValueError: ``kind`` is something else.
        """
        if kind == "dcn":
            conv = ModulatedDeformConv(in_channels, out_channels, kernel_size=kernel_size)
        elif kind == "conv":
            conv = same_conv(in_channels, out_channels, kernel_size, bias=False)
        else:
            raise ValueError(f"MODEL.LSNET.TOWER_CONV is {kind!r}; it must be 'dcn' or 'conv'")
        super().__init__(conv, nn.GroupNorm(GROUPS, out_channels), nn.ReLU(inplace=True))


def plain_convs(channels: int, number: int) -> nn.Sequential:
    return nn.Sequential(*(ConvNormAct(channels, channels) for _ in range(number)))


class Tower(nn.Sequential):
    """Convolutions that all levels share."""

    def __init__(self, channels: int, num_convs: int, kind: str) -> None:
        super().__init__(*[ConvNormAct(channels, channels, kind=kind) for _ in range(num_convs)])

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [super(Tower, self).forward(feature) for feature in features]
