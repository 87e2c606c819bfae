import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import Recorded

from lsnet_d2.layers import corner_pool

SIDES = ["top", "left", "bottom", "right"]


def features_of(height, width, seed):
    """Few different values, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (2, 3, height, width), generator=generator).float()


maps = st.builds(features_of, st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))


@pytest.mark.parametrize("side", SIDES)
def test_values_and_gradients_are_those_of_the_released_code(parity, side):
    recorded = Recorded("comp_cpv.npz", f"pool_{side}.")
    features = recorded["in"].requires_grad_()
    pooled = corner_pool(features, side)
    parity.equal("corner pooling", pooled, recorded["out"])
    pooled.backward(recorded["grad_out"])
    parity.absolute("corner pooling, gradient", features.grad, recorded["grad_in"], within=1e-6)


@given(maps)
def test_a_cell_sees_what_lies_away_from_the_side(features):
    height, width = features.shape[2:]
    pooled = {side: corner_pool(features, side) for side in SIDES}
    for y in range(height):
        for x in range(width):
            seen = {
                "top": features[:, :, y:, x],
                "left": features[:, :, y, x:],
                "bottom": features[:, :, : y + 1, x],
                "right": features[:, :, y, : x + 1],
            }
            for side, values in seen.items():
                assert torch.equal(pooled[side][:, :, y, x], values.amax(dim=2)), side


@given(maps, st.sampled_from(SIDES))
def test_pooling_twice_changes_nothing(features, side):
    pooled = corner_pool(features, side)
    assert torch.equal(corner_pool(pooled, side), pooled)


@given(maps)
def test_a_mirrored_map_is_pooled_to_the_other_side(features):
    for dim, (one, other) in {2: ("top", "bottom"), 3: ("left", "right")}.items():
        assert torch.equal(
            corner_pool(features.flip(dim), one).flip(dim), corner_pool(features, other)
        )


@given(maps, st.sampled_from(SIDES))
def test_all_gradient_arrives_where_the_largest_values_are(features, side):
    features.requires_grad_()
    pooled = corner_pool(features, side)
    pooled.sum().backward()
    assert features.grad.sum() == features.numel()
    # each cell hands its gradient to one that has its value
    (moved,) = torch.autograd.grad((corner_pool(features, side) * pooled.detach()).sum(), features)
    torch.testing.assert_close(moved, features.grad * features.detach())
