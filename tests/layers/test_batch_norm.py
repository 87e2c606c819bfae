import pytest
import torch
from detectron2.solver.build import get_default_optimizer_params
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from lsnet_d2.layers import FixedBatchNorm2d, ModulatedDeformConv, conv_norm


def make_reference():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, eps=1e-3)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def test_equals_batch_norm_in_evaluation_and_keeps_its_statistics_in_training():
    reference = make_reference()
    norm = FixedBatchNorm2d(4, eps=1e-3)
    norm.load_state_dict(reference.state_dict())  # which counts batches; that is dropped
    x = torch.randn(2, 4, 5, 6)
    expected = reference.eval()(x)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    norm.train()
    out = norm(x)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert norm.weight.grad.abs().min() > 0 and norm.bias.grad.abs().min() > 0
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def test_convert_replaces_nested_norms():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(make_reference()))
    expected = module[1][0].running_var.clone()
    assert FixedBatchNorm2d.convert(module) is module
    assert isinstance(module[1][0], FixedBatchNorm2d)
    assert module[1][0].eps == 1e-3
    assert torch.equal(module[1][0].running_var, expected)


def test_convert_replaces_the_module_itself_and_keeps_what_is_trained():
    norm = FixedBatchNorm2d.convert(make_reference().requires_grad_(False))
    assert isinstance(norm, FixedBatchNorm2d)
    assert not any(p.requires_grad for p in norm.parameters())
    assert FixedBatchNorm2d.convert(norm) is norm


def test_weight_decay_of_norms_applies():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), FixedBatchNorm2d(4))
    groups = get_default_optimizer_params(model, weight_decay=0.5, weight_decay_norm=0.0)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.5, 0.5, 0.0, 0.0]


def test_weights_are_those_of_batch_norm_without_the_count():
    norm, published = FixedBatchNorm2d(4), dict(make_reference().state_dict())  # has no version
    norm.load_state_dict(published)
    published.pop("num_batches_tracked")
    norm.load_state_dict(published)
    assert list(norm.state_dict()) == list(published)
    assert all(torch.equal(value, published[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_with_the_norm_folded_in_has_its_value_and_gradients(bias):
    norm = FixedBatchNorm2d.convert(make_reference()).double()
    conv = nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2, bias=bias).double()
    x = torch.randn(2, 6, 7, 8, dtype=torch.double, requires_grad=True)
    inputs = [x, *conv.parameters(), *norm.parameters()]
    expected, out = norm(conv(x)), conv_norm(x, conv, norm)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), None])
def test_other_norms_follow_the_convolution(norm):
    conv, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5)
    expected = conv(x) if norm is None else norm(conv(x))
    assert torch.equal(conv_norm(x, conv, norm), expected)


def test_the_norm_of_a_deformable_convolution_is_folded_in():
    norm = FixedBatchNorm2d.convert(make_reference())
    conv = ModulatedDeformConv(3, 4, norm=norm)
    nn.init.normal_(conv.conv_offset.weight, std=0.1)
    x = torch.randn(2, 3, 5, 6)
    out = conv(x)
    conv.norm = None
    torch.testing.assert_close(out, norm(conv(x)))


def test_folding_keeps_no_feature_map_but_the_input():
    norm, conv = FixedBatchNorm2d(4), nn.Conv2d(3, 4, 1, bias=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x), lambda x: x):
        conv_norm(torch.randn(2, 3, 9, 9), conv, norm)
    assert [x.shape for x in kept if x.shape[-2:] == (9, 9)] == [(2, 3, 9, 9)]


def test_statistics_are_not_taken_for_ones_to_estimate():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), FixedBatchNorm2d(4), nn.BatchNorm2d(4)).train()
    assert get_bn_modules(model) == [model[2]]
    assert get_bn_modules(FixedBatchNorm2d.convert(model)) == []
