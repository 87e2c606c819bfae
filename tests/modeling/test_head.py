import pytest
import torch

from lsnet_d2.layers import ModulatedDeformConv, PyramidDeformConv
from lsnet_d2.modeling.branches import ExtremeBranch
from lsnet_d2.modeling.head import LSNetHead

SIZES = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
NUM_POINTS = sum(h * w for h, w in SIZES)


def make_head(**kwargs):
    torch.manual_seed(0)
    kwargs = {"in_channels": 64, "num_classes": 3, "branches": [ExtremeBranch()], **kwargs}
    return LSNetHead(**kwargs)


def make_features(images=2, channels=64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(images, channels, h, w, generator=generator) for h, w in SIZES]


@pytest.mark.parametrize("tower_conv", ["dcn", "conv"])
def test_shapes_and_ranges(tower_conv):
    out = make_head(tower_conv=tower_conv)(make_features())
    assert out.logits.shape == (2, NUM_POINTS, 3)
    assert out.sizes == SIZES
    for vectors in (out.init[0], out.refine[0]):
        assert vectors.shape == (2, NUM_POINTS, 5, 4)
        assert (vectors >= 0).all()


def test_parameters_of_the_paper_head():
    """Counts follow from the layers' sizes; the released bbox_r50 head has the same total."""
    head = make_head(in_channels=256, num_classes=80)
    deformable = 9 * 256 * 256 + 256 + 27 * (9 * 256 + 1) + 2 * 256
    sampled = 9 * 256 * 256 + (768 + 1) * 256 + (9 * 256 + 1) * 256 + 2 * 256
    init = (9 * 256 + 1) * 256 + 28 * 257
    expected = 6 * deformable + 2 * sampled + init + (80 + 20) * 257
    assert sum(p.numel() for p in head.parameters()) == expected


def test_scores_start_at_the_prior():
    out = make_head(prior_prob=0.02, tower_conv="conv")(make_features())
    scores = out.logits.sigmoid()
    assert scores.mean().item() == pytest.approx(0.02, rel=0.05)


def test_tower_kinds():
    count = sum(isinstance(m, ModulatedDeformConv) for m in make_head(num_convs=2).modules())
    assert count == 4
    with pytest.raises(ValueError, match=r"MODEL\.LSNET\.TOWER_CONV is 'dcn2'"):
        make_head(tower_conv="dcn2")


def test_channels_must_fit_the_group_norm():
    for channels in (32, 80):
        with pytest.raises(ValueError, match=f"multiple of 32 channels.*got {channels}"):
            make_head(in_channels=channels)


def test_refinement_is_a_residual_without_gradient_to_the_initial_vectors():
    head = make_head(offset_gradient_mul=0.0)
    out = head(make_features())
    out.refine[0].sum().backward()
    assert head.branches["bbox"].init_out.weight.grad.abs().sum() == 0
    assert head.branches["bbox"].refine.out.weight.grad.abs().sum() > 0


def test_without_sampling_a_point_sees_its_surroundings_alone():
    head = make_head(tower_conv="conv", num_convs=1, sampling=False).eval()
    assert not any(isinstance(module, PyramidDeformConv) for module in head.modules())
    features = make_features(images=1)
    for feature in features:
        feature.requires_grad_()
    out = head(features)
    assert out.refine[0].shape == (1, NUM_POINTS, 5, 4)
    # The middle of the first level, through group norms of that level.
    (out.logits[0, 6 * 16 + 8].sum() + out.refine[0][0, 6 * 16 + 8].sum()).backward()
    assert features[0].grad.abs().max() > 0
    assert all(feature.grad is None or not feature.grad.any() for feature in features[1:])


def test_offset_gradient_is_scaled():
    gradients = []
    for factor in (1.0, 0.1):
        head = make_head(offset_gradient_mul=factor)
        with torch.no_grad():  # away from the flat start, where samples barely depend on places
            for parameter in head.parameters():
                parameter.add_(
                    0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
                )
        head(make_features()).logits.sum().backward()
        gradients.append(head.branches["bbox"].init_out.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], 0.1 * gradients[0], rtol=1e-3, atol=1e-4)


def test_images_of_a_batch_do_not_mix():
    head = make_head().eval()
    features = make_features()
    both = head(features)
    second = head([f[1:] for f in features])
    torch.testing.assert_close(both.logits[1:], second.logits)
    torch.testing.assert_close(both.refine[0][1:], second.refine[0])


def test_memory_format_does_not_matter():
    head = make_head().eval()
    features = make_features()
    strided = [f.to(memory_format=torch.channels_last) for f in features]
    torch.testing.assert_close(head(features).logits, head(strided).logits)
