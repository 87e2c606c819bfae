import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from parity import Recorded

from lsnet_d2.modeling.vectors import decode_vectors, encode_vectors

COORDINATE = st.floats(-1e4, 1e4, width=32)
DISPLACEMENTS = arrays("float32", st.tuples(st.integers(0, 20), st.just(2)), elements=COORDINATE)


def test_component_order_and_opposite_side():
    right_up = torch.tensor([3.0, -5.0])
    assert encode_vectors(right_up, alpha=0.2).tolist() == pytest.approx([5.0, 1.0, 0.6, 3.0])


def test_zero_counts_as_right_and_down_and_decodes_to_zero():
    encoded = encode_vectors(torch.zeros(2))
    assert encoded.tolist() == [0.0] * 4
    assert decode_vectors(encoded).tolist() == [0.0, 0.0]


def test_ties_decode_up_and_left():
    assert decode_vectors(torch.tensor([2.0, 2.0, 3.0, 3.0])).tolist() == [-3.0, -2.0]


@given(DISPLACEMENTS, st.floats(0, 0.99))
def test_decoding_undoes_encoding(displacements, alpha):
    displacements = torch.from_numpy(displacements)
    encoded = encode_vectors(displacements, alpha)
    assert (encoded >= 0).all()
    torch.testing.assert_close(decode_vectors(encoded), displacements)


@given(DISPLACEMENTS)
def test_a_mirrored_vector_swaps_left_and_right(displacements):
    displacements = torch.from_numpy(displacements)
    moved = displacements[(displacements != 0).all(1)]
    mirrored = encode_vectors(moved * torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(mirrored, encode_vectors(moved)[:, [0, 1, 3, 2]], rtol=0, atol=0)


def test_gradient_reaches_the_larger_side_only():
    components = torch.tensor([1.0, 2.0, 5.0, 3.0], requires_grad=True)
    decode_vectors(components).sum().backward()
    assert components.grad.tolist() == [0.0, 1.0, -1.0, 0.0]


@pytest.mark.parametrize("kind", ["bbox", "polygon", "keypoint"])
def test_targets_are_those_of_the_released_code(parity, kind):
    recorded = Recorded(f"comp_cross_iou_{kind}.npz")
    unit = recorded["normalize_term"][:, None, None]
    positive = recorded["weight"] > 0
    points = recorded["gt_pts"].view(len(unit), -1, 2)
    anchors = recorded["anchor_pts"][:, None, :2]
    encoded = encode_vectors((points - anchors) / unit, alpha=0.2)[positive]
    expected = recorded["target_after_alpha"].view(len(unit), -1, 4)[positive]
    assert positive.sum() > 50
    parity.to_largest("components of target vectors", encoded, expected, within=1e-6)


@pytest.mark.parametrize("branch", ["bbox", "segm", "pose_bbox"])
def test_decoding_is_that_of_the_released_code(parity, branch):
    recorded = Recorded("comp_head_decode.npz", f"{branch}.")
    components = recorded["softplus"].unflatten(1, (-1, 4)).movedim(2, -1)[:, :-1]
    decoded = decode_vectors(components).movedim(-1, 2).flatten(1, 2)
    parity.to_largest("decoded vectors", decoded, recorded["landmarks_xy"], within=1e-6)
