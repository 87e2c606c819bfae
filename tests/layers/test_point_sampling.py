import torch
from hypothesis import given
from hypothesis import strategies as st

from lsnet_d2.layers import PointSampler


@given(st.integers(1, 40), st.integers(1, 30), st.sampled_from([4, 8]))
def test_features_are_interpolated_in_pixels_of_the_image(x, y, stride):
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    # in image 1 the features are the coordinates of their cells
    ramps = torch.stack([columns, rows]) * stride
    features = torch.stack([torch.zeros_like(ramps), ramps])
    point = torch.tensor([x, y]).minimum(torch.tensor([11 * stride, 8 * stride])).double()
    points = torch.stack([point, point]).view(2, 1, 2)
    sampler = PointSampler([features.double()], [stride])
    sampled = sampler(torch.tensor([1, 0]), points)
    torch.testing.assert_close(sampled[0, 0], point)
    assert sampled[1].abs().max() == 0


STRIDES = [4, 8, 16]


def case():
    """Maps of two images, and places of which some lie outside."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 8 // n, 12 // n, dtype=torch.double) for n in (1, 2, 4)]
    points = torch.rand(3, 5, 2, dtype=torch.double) * torch.tensor([60.0, 44.0]) - 8
    return maps, torch.tensor([1, 0, 1]), points


def test_maps_of_several_strides():
    maps, image, points = case()
    together = PointSampler(maps, STRIDES)(image, points)
    alone = [
        PointSampler([one], [stride])(image, points)
        for one, stride in zip(maps, STRIDES, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone, dim=2))


def test_gradients_of_maps_and_places():
    maps, image, points = case()
    leaves = [x.requires_grad_() for x in (points, *maps)]
    assert torch.autograd.gradcheck(
        lambda points, *maps: PointSampler(list(maps), STRIDES)(image, points), leaves
    )


def test_what_is_made_for_inference_serves_training():
    maps, image, points = case()
    with torch.inference_mode():
        PointSampler(maps, STRIDES)(image, points)
    points.requires_grad_()
    PointSampler(maps, STRIDES)(image, points).sum().backward()
    assert points.grad.abs().sum() > 0
