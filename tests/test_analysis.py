import pytest
import torch
from detectron2.layers import Conv2d
from tiny_model import tiny_model
from torch import nn

from lsnet_d2.analysis import count_activations, count_flops
from lsnet_d2.layers import ModulatedDeformConv

HEIGHT, WIDTH = 6, 8
PIXELS, TAPS = HEIGHT * WIDTH, 9


class OnImages(nn.Module):
    """A layer in the place of a detector."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, batched_inputs):
        return self.layer(batched_inputs[0]["image"][None].float())


@torch.no_grad()
def counts(layer):
    model = OnImages(layer).eval()
    return (
        count_flops(model, HEIGHT, WIDTH).total(),
        count_activations(model, HEIGHT, WIDTH).total(),
    )


def test_convolution():
    assert counts(Conv2d(3, 5, 3, padding=1)) == (PIXELS * 5 * 3 * TAPS, PIXELS * 5)


@pytest.mark.parametrize("groups", [1, 3])
def test_deformable_convolution(groups):
    """Offsets, a projection of every pixel for every tap, and four corners of every tap."""
    flops, activations = counts(ModulatedDeformConv(3, 6, groups=groups))
    offsets = PIXELS * 27 * 3 * TAPS
    projection = PIXELS * TAPS * 6 * 3 // groups
    assert flops == offsets + projection + PIXELS * TAPS * 4 * 6
    assert activations == PIXELS * (27 + 6 * TAPS + 6)


@pytest.mark.parametrize("groups", [1, 3])
def test_deformable_convolution_with_stride(groups):
    """Samples are taken first, four corners of every channel, then projected."""
    flops, activations = counts(ModulatedDeformConv(3, 6, stride=2, groups=groups))
    outputs = PIXELS // 4
    offsets = outputs * 27 * 3 * TAPS
    projection = outputs * TAPS * 6 * 3 // groups
    assert flops == offsets + projection + outputs * TAPS * 4 * 3
    assert activations == outputs * (27 + 3 * TAPS + 6)


@torch.no_grad()
def test_sampling_of_the_head_is_counted():
    """Both predictors sample 9 places on 3 levels, 4 corners each; there are 64 channels."""
    model = tiny_model(TOWER_CONV="conv").eval()
    flops = count_flops(model, 64, 96)
    anchor_points = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1 * 1
    assert flops.by_operator()["embedding_bag"] == 2 * anchor_points * 3 * 9 * 4 * 64
    assert flops.by_operator()["linear"] == 2 * anchor_points * 9 * 64 * 64
    assert not any("conv" in name or "bmm" in name for name in flops.unsupported_ops())
    sampled = count_activations(model, 64, 96).by_operator()["embedding_bag"]
    assert sampled == 2 * anchor_points * 3 * 64
