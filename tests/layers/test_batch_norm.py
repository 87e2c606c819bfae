import torch
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from lsnet_d2.layers import FixedBatchNorm2d


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
