import pytest
import torch

from lsnet_d2.layers import PyramidDeformConv, PyramidGrid, sampled_conv
from lsnet_d2.layers.deform_conv import tap_offsets
from lsnet_d2.layers.pyramid_sampling import source_levels

SIZES = [(13, 17), (7, 9), (4, 5), (2, 3)]


def case(images=2, channels=4, dtype=torch.double):
    torch.manual_seed(0)
    features = [torch.randn(images, channels, h, w, dtype=dtype) for h, w in SIZES]
    num_points = sum(h * w for h, w in SIZES)
    points = 2 * torch.randn(images, num_points, 9, 2, dtype=dtype)
    return features, points


def one_by_one(features, points, weight, reference_offsets):
    """Level by level and source by source, with the offsets in place as the paper has them."""
    tap_x, tap_y = tap_offsets(3).to(points.dtype).unbind(1)
    outputs, start = [], 0
    for level, (height, width) in enumerate(SIZES):
        level_points = points[:, start : start + height * width]
        level_points = level_points.unflatten(1, (height, width)).movedim(3, 1)
        start += height * width
        offset_y = level_points[..., 1] - tap_y.view(-1, 1, 1)
        offset_x = level_points[..., 0] - tap_x.view(-1, 1, 1)
        accumulated_h = accumulated_w = 1.0
        sources = []
        for source in source_levels(level, len(SIZES)):
            scale_h, scale_w = SIZES[source][0] / height, SIZES[source][1] / width
            accumulated_h, accumulated_w = accumulated_h * scale_h, accumulated_w * scale_w
            used_h = accumulated_h if reference_offsets else scale_h
            used_w = accumulated_w if reference_offsets else scale_w
            y = (torch.arange(height)[:, None] + tap_y.view(-1, 1, 1)) * scale_h + offset_y * used_h
            x = (torch.arange(width) + tap_x.view(-1, 1, 1)) * scale_w + offset_x * used_w
            sources.append(sampled_conv(features[source], weight, y, x))
        outputs.append(torch.cat(sources, dim=1).flatten(2).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def test_neighbours():
    assert [source_levels(i, 5) for i in range(5)] == [
        (0, 1, 2), (1, 0, 2), (2, 1, 3), (3, 2, 4), (4, 3, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("reference_offsets", [False, True])
def test_all_levels_at_once_equal_one_by_one(reference_offsets):
    features, points = case()
    conv = PyramidDeformConv(4, 5).double()
    features = [f.requires_grad_() for f in features]
    inputs = [*features, points.requires_grad_(), conv.weight]
    grid = PyramidGrid(points, SIZES, reference_offsets=reference_offsets)
    out = conv(features, grid)
    expected = one_by_one(features, points, conv.weight, reference_offsets)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    signal = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, signal),
        torch.autograd.grad(expected, inputs, signal),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_points_on_cells_read_those_cells():
    """A point displaced by whole cells sees the feature of that cell on its own level."""
    features, points = case(images=1, channels=1)
    points = torch.zeros_like(points[:1])
    points[..., 0] = 2  # two cells to the right
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.double)
    weight[0, 0, 1, 1] = 1
    out = PyramidGrid(points, SIZES).convolve(features, weight)[0, :, 0]
    own = out[: 13 * 17].view(13, 17)
    torch.testing.assert_close(own[:, :-2], features[0][0, 0, :, 2:])
    assert (own[:, -2:] == 0).all()


def test_correct_offsets_place_all_sources_on_one_image_point():
    """On linear ramps the three levels must agree on where the landmark is."""
    sizes = [(16, 16), (8, 8), (4, 4)]
    ramps = [(torch.arange(w, dtype=torch.double) * (16 / w)).expand(1, 1, h, w) for h, w in sizes]
    points = torch.zeros(1, sum(h * w for h, w in sizes), 9, 2, dtype=torch.double)
    points[..., 0] = 1.5
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.double)
    weight[0, 0, 0, 0] = 1
    out = PyramidGrid(points, sizes).convolve(ramps, weight)[0]
    cell = 5 * 16 + 4  # row 5, column 4 of the finest level
    torch.testing.assert_close(out[cell], torch.full((3,), 5.5, dtype=torch.double))
    accumulated = PyramidGrid(points, sizes, reference_offsets=True).convolve(ramps, weight)[0]
    # On the third level offsets from tap (-1, -1) shrink to 1/8 instead of 1/4.
    expected = [5.5, 5.5, (3 / 4 + (1.5 + 1) / 8) * 4]
    torch.testing.assert_close(accumulated[cell], torch.tensor(expected, dtype=torch.double))


def test_a_grid_made_for_inference_serves_training():
    features, points = case()
    conv = PyramidDeformConv(4, 5).double()
    with torch.inference_mode():
        conv(features, PyramidGrid(points, SIZES))
    points.requires_grad_()
    conv(features, PyramidGrid(points, SIZES)).sum().backward()
    assert points.grad.abs().sum() > 0


def test_errors():
    _, points = case()
    with pytest.raises(ValueError, match="at least 3 levels, got 2"):
        PyramidGrid(points, SIZES[:2])
    with pytest.raises(ValueError, match="do not fill"):
        PyramidGrid(points[:, 1:], SIZES)


def test_places_in_bfloat16_are_computed_in_float32():
    """Cell 301 has no number of its own in bfloat16; a sample there must still come from it."""
    sizes = [(2, 302), (1, 151), (1, 76)]
    features = [torch.zeros(1, 4, *size) for size in sizes]
    features[0][..., 301] = 1.0
    points = torch.zeros(1, sum(h * w for h, w in sizes), 9, 2)
    weight = torch.ones(1, 4, 3, 3)
    exact, low = (
        PyramidGrid(points.to(dtype), sizes).convolve(features, weight)[0, :604, 0].view(2, 302)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact[0, 301] == 36 and exact[0, 300] == 0
    assert torch.equal(low, exact)
