"""Optimizers built from the keys of SOLVER."""

import copy

import pytest
import tiny_coco
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from torch import nn

from lsnet_d2 import add_lsnet_config
from lsnet_d2.engine import LSNetTrainer
from lsnet_d2.errors import ConfigError
from lsnet_d2.solver import (
    build_optimizer,
    clip_whole_gradient,
    scale_schedule,
    schedule_of_length,
)


class Model(nn.Module):
    """Names as in a detector: a network under a pyramid, a norm, a head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"bottom_up": nn.Linear(1, 1), "fpn": nn.Linear(1, 1)})
        self.norm = nn.GroupNorm(1, 1)
        self.head = nn.Linear(1, 1, bias=False)


def solver_cfg(**values):
    cfg = get_cfg()
    add_lsnet_config(cfg)
    for key, value in values.items():
        cfg.SOLVER[key] = value
    return cfg


def settings(optimizer, model):
    """Learning rate and weight decay of each parameter, by name."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        names[p]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def step(optimizer, model, gradients):
    """What a step takes away from each parameter."""
    before = [p.detach().clone() for p in model.parameters()]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = torch.full_like(p, gradient)
    optimizer.step()
    return [float(x - y.detach()) for x, y in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize("max_norm, factor", [(1.0, 1 / 5), (35.0, 1.0)])
def test_whole_gradient_is_clipped(max_norm, factor):
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    frozen = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b, frozen], "lr": 0.5}], lr=1.0)
    clip_whole_gradient(optimizer, max_norm)
    a.grad, b.grad = torch.tensor([0.0, 3.0]), torch.tensor([4.0])
    optimizer.step()
    torch.testing.assert_close(a.data, torch.tensor([0.0, -3 * factor]))
    torch.testing.assert_close(b.data, torch.tensor([-2 * factor]))


@pytest.mark.parametrize(
    "clip_type, expected", [("full_model", [0.6, 0.8]), ("norm", [1.0, 1.0]), ("value", [1.0, 1.0])]
)
def test_gradients_are_clipped_as_the_type_says(clip_type, expected):
    cfg = solver_cfg(BASE_LR=1.0, WEIGHT_DECAY=0.0)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip_type
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    taken = step(build_optimizer(cfg, model), model, (3.0, 4.0))
    assert taken == pytest.approx(expected, rel=1e-4)


def test_sgd_is_that_of_detectron2():
    cfg = solver_cfg(BASE_LR=0.3, WEIGHT_DECAY=0.01, BIAS_LR_FACTOR=2.0, NESTEROV=True)
    gradients = [0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 0.7]
    model = Model()
    results = []
    for build in (build_optimizer, build_detectron2_optimizer):
        trained = copy.deepcopy(model)
        optimizer = build(cfg, trained)
        for _ in range(3):
            step(optimizer, trained, gradients)
        results.append((list(trained.parameters()), settings(optimizer, trained)))
    (ours, our_settings), (theirs, their_settings) = results
    assert our_settings == their_settings
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_adamw_takes_steps_of_the_learning_rate():
    cfg = solver_cfg(OPTIMIZER="AdamW", BASE_LR=0.01, WEIGHT_DECAY=0.0, BACKBONE_MULTIPLIER=0.25)
    model = Model()
    taken = step(build_optimizer(cfg, model), model, [5.0, -5.0, 1e-3, 1.0, 1.0, 1.0, -2.0])
    # Adam's first step is the sign of the gradient.
    expected = [0.0025, -0.0025, 0.01, 0.01, 0.01, 0.01, -0.01]
    assert taken == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_backbone_and_norms_have_their_own_settings(optimizer):
    cfg = solver_cfg(
        OPTIMIZER=optimizer,
        BASE_LR=0.01,
        BACKBONE_MULTIPLIER=0.5,
        WEIGHT_DECAY=0.1,
        WEIGHT_DECAY_NORM=0.0,
    )
    model = Model()
    assert settings(build_optimizer(cfg, model), model) == {
        "backbone.bottom_up.weight": (0.005, 0.1),
        "backbone.bottom_up.bias": (0.005, 0.1),
        "backbone.fpn.weight": (0.01, 0.1),
        "backbone.fpn.bias": (0.01, 0.1),
        "norm.weight": (0.01, 0.0),
        "norm.bias": (0.01, 0.0),
        "head.weight": (0.01, 0.1),
    }


def test_the_factor_of_biases_comes_on_top():
    cfg = solver_cfg(BASE_LR=0.01, BACKBONE_MULTIPLIER=0.5, BIAS_LR_FACTOR=3.0)
    model = Model()
    found = {name: rate for name, (rate, _) in settings(build_optimizer(cfg, model), model).items()}
    assert found == pytest.approx(
        {
            **{"backbone.bottom_up.weight": 0.005, "backbone.bottom_up.bias": 0.015},
            **{"backbone.fpn.weight": 0.01, "backbone.fpn.bias": 0.03},
            **{"norm.weight": 0.01, "norm.bias": 0.03, "head.weight": 0.01},
        }
    )


def test_unknown_optimizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"SOLVER.OPTIMIZER is 'LAMB'.*SGD, AdamW"):
        tiny_coco.load_tiny_config(tmp_path, "SOLVER.OPTIMIZER", "LAMB")
    cfg = tiny_coco.load_tiny_config(tmp_path)
    cfg.SOLVER.OPTIMIZER = "LAMB"  # by the API
    with pytest.raises(ConfigError, match=r"SOLVER.OPTIMIZER is 'LAMB'.*SGD, AdamW"):
        LSNetTrainer.build_optimizer(cfg, Model())


class TestScaleSchedule:
    """The schedule of a batch for another one."""

    def cfg(self, **values):
        cfg = solver_cfg(
            IMS_PER_BATCH=4,
            REFERENCE_IMS_PER_BATCH=16,
            BASE_LR=0.01,
            STEPS=(58640, 80630),
            MAX_ITER=87960,
            WARMUP_ITERS=500,
            CHECKPOINT_PERIOD=7330,
            **values,
        )
        cfg.TEST.EVAL_PERIOD = 7330
        return cfg

    def test_as_many_images_at_a_rate_of_the_batch(self, caplog):
        cfg = self.cfg()
        with caplog.at_level("INFO", logger="lsnet_d2"):
            scale_schedule(cfg)
        assert cfg.SOLVER.BASE_LR == 0.0025
        assert cfg.SOLVER.STEPS == (234560, 322520)
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS) == (351840, 2000)
        assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (29320, 29320)
        assert "IMS_PER_BATCH is 4 and the schedule is for 16" in caplog.text
        assert "SOLVER.BASE_LR 0.01 -> 0.0025" in caplog.text
        assert "SOLVER.MAX_ITER 87960 -> 351840" in caplog.text

        caplog.clear()
        before = cfg.clone()
        with caplog.at_level("INFO", logger="lsnet_d2"):
            scale_schedule(cfg)  # as when the config that was written down is used again
        assert cfg == before and not caplog.text

    def test_the_rate_of_adamw_grows_with_the_root(self):
        cfg = self.cfg(OPTIMIZER="AdamW")
        scale_schedule(cfg)
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.005, 351840)

    def test_what_is_given_stays(self):
        cfg = self.cfg()
        scale_schedule(cfg, given=["SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER", "SOLVER.BASE_LR"])
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.01, 87960)
        assert cfg.SOLVER.WARMUP_ITERS == 2000

    def test_the_rate_at_the_end_keeps_its_share(self):
        cfg = self.cfg()
        cfg.SOLVER.IMS_PER_BATCH = 4
        cfg.SOLVER.BASE_LR_END = cfg.SOLVER.BASE_LR / 10
        scale_schedule(cfg)
        assert pytest.approx(cfg.SOLVER.BASE_LR / 10) == cfg.SOLVER.BASE_LR_END

    def test_never_stays_never_and_once_stays_once(self):
        cfg = self.cfg()
        cfg.SOLVER.IMS_PER_BATCH = 16 * 10**6
        cfg.TEST.EVAL_PERIOD = 0
        scale_schedule(cfg)
        assert cfg.TEST.EVAL_PERIOD == 0
        assert cfg.SOLVER.CHECKPOINT_PERIOD == cfg.SOLVER.MAX_ITER == 1

    @pytest.mark.parametrize("reference", [0, 4])
    def test_nothing_to_do(self, reference, caplog):
        cfg = self.cfg()
        cfg.SOLVER.REFERENCE_IMS_PER_BATCH = reference
        before = cfg.clone()
        scale_schedule(cfg)
        assert cfg == before and not caplog.text


def test_a_schedule_of_another_length():
    cfg = solver_cfg(MAX_ITER=1000, STEPS=(600, 900), WARMUP_ITERS=100, CHECKPOINT_PERIOD=300)
    assert schedule_of_length(cfg, 250) == {
        "SOLVER.MAX_ITER": 250,
        "SOLVER.STEPS": (150, 225),
        "SOLVER.WARMUP_ITERS": 25,
        "SOLVER.CHECKPOINT_PERIOD": 75,
    }
    assert cfg.SOLVER.MAX_ITER == 1000
    steps = {n: schedule_of_length(cfg, n)["SOLVER.STEPS"] for n in (1, 2, 3, 20)}
    assert steps == {1: (), 2: (1,), 3: (2,), 20: (12, 18)}  # all before the end
