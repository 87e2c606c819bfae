import torch
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
