import torch
from hypothesis import given
from hypothesis import strategies as st

from lsnet_d2.layers import sample_features


@given(st.integers(1, 40), st.integers(1, 30), st.sampled_from([4, 8]))
def test_features_are_interpolated_in_pixels_of_the_image(x, y, stride):
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    # in image 1 the features are the coordinates of their cells
    ramps = torch.stack([columns, rows]) * stride
    features = torch.stack([torch.zeros_like(ramps), ramps])
    point = torch.tensor([x, y]).minimum(torch.tensor([11 * stride, 8 * stride])).double()
    points = torch.stack([point, point]).view(2, 1, 2)
    sampled = sample_features(features.double(), stride, torch.tensor([1, 0]), points)
    torch.testing.assert_close(sampled[0, 0], point)
    assert sampled[1].abs().max() == 0
