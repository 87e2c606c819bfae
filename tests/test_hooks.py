import pytest
import torch
from torch import nn

from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.hooks import CheckpointOfAverage, WeightAverage


def averaged(decay, steps, start=0):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    hook = WeightAverage(model, decay)
    for step in range(start, steps):
        nn.init.constant_(model[0].weight, float(step))
        model[1].running_mean.fill_(step)
        hook.after_step()
    return model, hook


@pytest.mark.parametrize("decay", [0.3, 0.9998])
def test_mean_of_weights(decay):
    model, hook = averaged(decay, 6)
    expected = 0.0
    for n in range(1, 6):
        keep = min(decay, n / (n + 9))
        expected = keep * expected + (1 - keep) * n
    assert hook.averaged[0].weight.item() == pytest.approx(expected)
    assert hook.averaged[1].running_mean.item() == 5  # of the trained model
    assert model[0].weight.item() == 5


def test_checkpoints_have_both(tmp_path):
    model, hook = averaged(0.9, 4)
    files = LSNetCheckpointer(
        model, str(tmp_path), averaged=hook.averaged, average=CheckpointOfAverage(hook)
    )
    files.save("model_0000003", iteration=3)
    saved = torch.load(tmp_path / "model_0000003.pth")
    assert saved["weights"] == "averaged"
    assert torch.equal(saved["model"]["0.weight"], hook.averaged[0].weight)
    assert saved["average"]["trained"]["0.weight"].item() == 3

    # for anything but going on, they are the model's weights
    other, _ = averaged(0.9, 0)
    LSNetCheckpointer(other).load(str(tmp_path / "model_0000003.pth"), strict=True)
    assert torch.equal(other[0].weight, hook.averaged[0].weight)

    other, again = averaged(0.9, 0)
    files = LSNetCheckpointer(
        other, str(tmp_path), averaged=again.averaged, average=CheckpointOfAverage(again)
    )
    files.resume_or_load("", resume=True)
    assert other[0].weight.item() == 3
    assert torch.equal(again.averaged[0].weight, hook.averaged[0].weight)
    for trained, average in ((model, hook), (other, again)):
        nn.init.constant_(trained[0].weight, 9.0)
        average.after_step()
    assert torch.equal(again.averaged[0].weight, hook.averaged[0].weight)
