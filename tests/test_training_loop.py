import pytest
import torch
from detectron2.utils.events import EventStorage
from tiny_model import make_input, tiny_cfg, tiny_model
from torch import nn

from lsnet_d2.errors import ConfigError, NonFiniteLossError
from lsnet_d2.solver import clip_whole_gradient
from lsnet_d2.training_loop import LSNetTrainLoop, amp_dtype

BATCH = [
    make_input([[10, 12, 60, 70], [70, 20, 120, 90]], [0, 1], seed=1),
    make_input([[30, 40, 44, 60]], [2], seed=2),
]
TASKS = {
    "boxes": {},
    "plain towers": {"TOWER_CONV": "conv"},
    "corners": {"CPV": True},
    "joint": {
        "TASK": "joint",
        "BRANCHES": ["extreme", "contour", "keypoint"],
        "POLISH_IN_FEATURES": ["p3", "p4"],
        "TRACED_POINTS": 48,
    },
}


class Linear(nn.Module):
    """Loses the product of its parameter and the batch."""

    def __init__(self, value=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), value))

    def forward(self, batch):
        return {"loss": (torch.tensor([[batch]]) @ self.weight).sum().float()}


def run(model, batches, optimizer=None, steps=1, **kwargs):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    loop = LSNetTrainLoop(model, batches, optimizer, **kwargs)
    loop.iter = 0
    with EventStorage() as storage:
        for _ in range(steps):
            loop.run_step()
    return loop, storage


def test_precisions():
    cfg = tiny_cfg()
    assert amp_dtype(cfg) is None
    cfg.SOLVER.AMP.ENABLED = True
    assert amp_dtype(cfg) is torch.bfloat16
    cfg.MODEL.DEVICE = "cuda:1"
    assert amp_dtype(cfg) is torch.float16
    cfg.SOLVER.AMP.PRECISION = "bfloat16"
    assert amp_dtype(cfg) is torch.bfloat16
    cfg.SOLVER.AMP.PRECISION = "half"
    with pytest.raises(ConfigError, match="AMP.PRECISION is 'half'"):
        amp_dtype(cfg)


@pytest.mark.parametrize("task", TASKS)
def test_losses_and_gradients_in_bfloat16_are_near(task):
    # Before training all components of the vectors are nearly equal, and rounding decides which
    # way they point. (With seed 0 it also decides which of two points learns an object's box.)
    model = tiny_model(seed=1, **TASKS[task])
    run(model, [BATCH] * 30, torch.optim.AdamW(model.parameters(), lr=1e-3), steps=30)
    found = []
    for dtype in (None, torch.bfloat16):
        # a step of length zero leaves the gradients
        loop, storage = run(
            model, [BATCH], torch.optim.SGD(model.parameters(), lr=0.0), amp_dtype=dtype
        )
        names = [name for name in storage.histories() if name.startswith("loss_")]
        losses = {name: storage.history(name).latest() for name in names}
        offsets, rest = [], []
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32
            of_offsets = "conv_offset" in name
            (offsets if of_offsets else rest).append(parameter.grad.flatten().clone())
        found.append((losses, torch.cat(rest), torch.cat(offsets) if offsets else None))
    (losses, rest, offsets), (low_losses, low_rest, low_offsets) = found
    assert low_losses != losses  # it was another precision
    # How bfloat16 is added up is the processor's; rounding moves the maxima that corners pool.
    assert low_losses == pytest.approx(losses, rel=0.05)
    least, within = (0.7, 0.2) if task == "corners" else (0.9, 0.1)
    assert torch.cosine_similarity(rest, low_rest, dim=0) > least
    assert low_rest.norm().item() == pytest.approx(rest.norm().item(), rel=within)
    assert (offsets is None) == (task == "plain towers")
    if offsets is not None:
        # Slopes of bilinear sampling jump where rounding moves a point into the next cell.
        assert torch.cosine_similarity(offsets, low_offsets, dim=0) > least
        assert low_offsets.norm().item() == pytest.approx(offsets.norm().item(), rel=0.2)


@pytest.mark.parametrize("task", TASKS)
def test_training_in_bfloat16_learns(task):
    model = tiny_model(**TASKS[task])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    _, storage = run(model, [BATCH] * 12, optimizer, steps=12, amp_dtype=torch.bfloat16)
    totals = [value for value, _ in storage.history("total_loss").values()]
    assert totals[-1] < 0.9 * totals[0]
    assert all(p.isfinite().all() for p in model.parameters())


def test_parts_of_a_step_are_averaged():
    model = Linear()
    loop, storage = run(model, [1.0, 2.0, 6.0, 100.0], accumulation_steps=3)
    assert model.weight.item() == 1 - 3
    assert storage.history("total_loss").latest() == 3
    assert next(loop._data_loader_iter) == 100


def test_accumulated_parts_of_equal_batches_are_one_batch():
    gradients = []
    for batches, steps in (([BATCH[:1] * 2], 1), ([BATCH[:1]] * 2, 2)):
        model = tiny_model(**TASKS["joint"])
        run(model, batches, torch.optim.SGD(model.parameters(), lr=0.0), accumulation_steps=steps)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def scaled(loop, scale):
    loop.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return loop


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_clipped_after_the_scale_is_taken_out(fused):
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    clip_whole_gradient(optimizer, 0.5)
    loop = scaled(LSNetTrainLoop(model, [4.0], optimizer), 1024.0)
    loop.iter = 0
    with EventStorage():
        loop.run_step()
    assert model.weight.item() == pytest.approx(0.5)  # 1 minus the clipped gradient


def test_steps_that_overflow_are_left_out_and_lower_the_scale():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loop = scaled(LSNetTrainLoop(model, [3e38], optimizer), 1024.0)
    loop.iter = 0
    with EventStorage():
        loop.run_step()
    assert model.weight.item() == 1
    state = loop.state_dict()["grad_scaler"]
    assert state["scale"] == 512
    other = scaled(LSNetTrainLoop(model, [1.0], optimizer), 1024.0)
    other.load_state_dict(loop.state_dict())
    assert other.grad_scaler.get_scale() == 512


def test_only_float16_is_scaled():
    for dtype in (None, torch.bfloat16):
        loop, _ = run(Linear(), [1.0], amp_dtype=dtype)
        assert not loop.grad_scaler.is_enabled()


class Given(nn.Module):
    """Loses what the images say."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        values = torch.tensor([image["loss"] for image in batch])
        return {"loss_a": (values * self.weight).sum(), "loss_b": self.weight.sum()}


def images(*losses, start=0):
    return [{"file_name": f"{start + i}.png", "loss": x} for i, x in enumerate(losses)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_a_loss_that_is_not_finite_stops(value, scale):
    model = Given()
    batches = [images(1.0, 2.0), images(1.0, start=2), images(1.0, value, start=3), images(1.0)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = LSNetTrainLoop(model, batches, optimizer, accumulation_steps=2)
    if scale:
        scaled(loop, scale)
    with EventStorage() as storage:
        loop.iter = 0
        loop.run_step()
        weight = model.weight.item()
        loop.iter = 1
        with pytest.raises(NonFiniteLossError) as error:
            loop.run_step()
    assert weight == pytest.approx(1 - 0.1 * 3) and model.weight.item() == weight
    found = error.value
    assert found.iteration == 1 and found.file_names == ["3.png", "4.png", "0.png"]
    assert found.losses.keys() == {"loss_a"}
    assert str(found).startswith(f"iteration 1: loss_a is {value:g}, for the images 3.png, 4.png,")
    assert len(storage.history("total_loss").values()) == 1


def test_a_loss_of_another_process_stops_this_one(monkeypatch):
    theirs = ({"loss_a": 1.0}, 0.0, {"loss_a": float("nan")}, ["7.png"])
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda mine: [mine, theirs])
    with pytest.raises(NonFiniteLossError, match="iteration 0 in process 1: loss_a is nan.* 7.png"):
        run(Given(), [images(1.0)])
