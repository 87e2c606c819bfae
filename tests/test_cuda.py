"""What a GPU computes, beside a CPU: `pytest --device cuda`.

Whole models are compared with the released code in `modeling/test_model_parity.py`.
"""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from tiny_model import make_input, tiny_model

from lsnet_d2.layers import PointSampler, PyramidDeformConv, PyramidGrid, corner_pool, deform_conv
from lsnet_d2.layers.row_sum import RowIndex, weighted_row_sum
from lsnet_d2.modeling.assigners import assign_atss, assign_nearest
from lsnet_d2.training_loop import LSNetTrainLoop

SIZES = [(25, 38), (13, 19), (7, 10), (4, 5), (2, 3)]
STRIDES = [8, 16, 32, 64, 128]
BATCH = [
    make_input([[10, 12, 60, 70], [70, 20, 120, 90]], [0, 1], seed=1),
    make_input([[30, 40, 44, 60]], [2], seed=2),
]
JOINT = {
    "TASK": "joint",
    "BRANCHES": ["extreme", "contour", "keypoint"],
    "POLISH_IN_FEATURES": ["p3", "p4"],
    "KEYPOINT_SEARCH": True,
    "POLISH_GRID": 2,
    "POLISH_STEPS": 2,
    "POLISH_REPEATS_TEST": 1,
    "KEYPOINT_SEARCH_CONVS": 2,
    "CONTOUR_AREA_LOSS_WEIGHT": 6.0,
    "TRACED_POINTS": 48,
    "TOWER_CONV": "conv",
}
MODELS = {"bbox": {}, "corners": {"CPV": True}, "segm": {"TASK": "segm"}, "joint": JOINT}


@pytest.fixture(autouse=True)
def cuda(device):
    if device.type != "cuda":
        pytest.skip("compares a GPU with the CPU: pytest --device cuda")
    return device


def on_both(function, *inputs):
    """Results and gradients of a function of float tensors, as computed on the CPU and the GPU."""
    found = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in inputs]
        out = function(*leaves)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).to(device)
        gradients = torch.autograd.grad((out * weights).sum(), leaves)
        found.append([out.detach().cpu(), *(x.cpu() for x in gradients)])
    return found


def normal(*shape, dtype=torch.double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


DEFORMABLE = ["_torch_modulated_deform_conv", "_torchvision_modulated_deform_conv"]


@pytest.mark.parametrize("name", DEFORMABLE)
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_deformable_convolution(name, stride, groups):
    height, width = -(-9 // stride), -(-12 // stride)
    inputs = [
        normal(3, 8, 9, 12),
        2 * normal(3, 18, height, width),
        normal(3, 9, height, width).sigmoid(),
        normal(6, 8 // groups, 3, 3),
        normal(6),
    ]
    function = getattr(deform_conv, name)
    reference, _ = on_both(
        lambda *x: deform_conv._torch_modulated_deform_conv(*x, stride, groups), *inputs
    )
    _, found = on_both(lambda *x: function(*x, stride, groups), *inputs)
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled_operator_of_detectron2():
    if not deform_conv._detectron2_has_cuda_operators():
        pytest.skip("this Detectron2 has no CUDA operators")
    assert (
        deform_conv.select_implementation("cuda", autocast=False)
        is deform_conv._detectron2_modulated_deform_conv
    )
    inputs = [normal(3, 8, 9, 12), 2 * normal(3, 18, 9, 12), normal(3, 9, 9, 12).sigmoid()]
    inputs = [x.float() for x in [*inputs, normal(6, 8, 3, 3), normal(6)]]
    reference, _ = on_both(deform_conv._torch_modulated_deform_conv, *inputs)
    found = []
    leaves = [x.to("cuda").requires_grad_() for x in inputs]
    out = deform_conv._detectron2_modulated_deform_conv(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to("cuda")
    found = [out, *torch.autograd.grad((out * weights).sum(), leaves)]
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours.detach().cpu(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reference_offsets", [False, True])
def test_pyramid_sampling(reference_offsets):
    features = [normal(2, 16, *size) for size in SIZES]
    points = 3 * normal(2, sum(h * w for h, w in SIZES), 9, 2)
    weight = PyramidDeformConv(16, 8).weight.detach().double()

    def sample(points, weight, *features):
        grid = PyramidGrid(points, SIZES, reference_offsets=reference_offsets)
        return grid.convolve(list(features), weight)

    for ours, theirs in zip(*on_both(sample, points, weight, *features), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_point_sampling():
    maps, image = [normal(2, 16, *size) for size in SIZES], torch.tensor([1, 0, 1])
    points = 64 + 60 * normal(3, 7, 2)

    def sample(points, *maps):
        return PointSampler(list(maps), STRIDES)(image.to(points.device), points)

    for ours, theirs in zip(*on_both(sample, points, *maps), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_row_sums_and_pools():
    rows = torch.randint(50, (200, 7), generator=torch.Generator().manual_seed(1))

    def sums(table, weights):
        return weighted_row_sum(table, RowIndex(rows.to(table.device), 50), weights)

    for ours, theirs in zip(*on_both(sums, normal(50, 6), normal(200, 7)), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(
        *on_both(lambda x: corner_pool(x, "top"), normal(2, 3, 9, 8)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_assignments_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(60, 2, generator=generator) * 250
    boxes = torch.cat([corner, corner + 4 + 60 * torch.rand(60, 2, generator=generator)], dim=1)
    xy = torch.cat(
        [
            torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"), -1).view(
                -1, 2
            )
            * float(s)
            for (h, w), s in zip(SIZES, STRIDES, strict=True)
        ]
    )
    per_level = [h * w for h, w in SIZES]
    around = torch.cat([xy - 20, xy + 20], dim=1) + torch.randn(len(xy), 4, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        args = [x.to(device) for x in (xy, boxes, around)]
        init = assign_nearest(args[0], STRIDES, per_level, args[1], num_positives=4)
        refine, _ = assign_atss(args[2], per_level, args[1])
        found.append((init.cpu(), refine.cpu()))
    for ours, theirs in zip(*found, strict=True):
        assert (theirs >= 0).sum() > 30
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lsnet", MODELS.values(), ids=MODELS)
def test_losses_and_gradients(lsnet):
    found = []
    model = tiny_model(**lsnet)
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(model).to(device)
        with EventStorage():
            losses = own(BATCH)
        sum(losses.values()).backward()
        gradients = {n: p.grad.cpu() for n, p in own.named_parameters() if p.grad is not None}
        found.append(({k: v.item() for k, v in losses.items()}, gradients))
    (losses, gradients), (theirs, their_gradients) = found
    assert theirs == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        if name == "polish.heatmaps.pose.bias":  # before a softmax: 0 but for rounding
            assert max(gradient.norm(), their_gradients[name].norm()) < 1e-6
            continue
        distance = (gradient - their_gradients[name]).norm() / gradient.norm().clamp(min=1e-6)
        assert distance < 1e-3, (name, distance)


@pytest.mark.parametrize("name", ["bbox", "segm", "joint"])
def test_detections(name):
    model = tiny_model(SCORE_THRESH_TEST=0.0, **MODELS[name]).eval()
    found = []
    for device in ("cpu", "cuda"):
        with torch.no_grad():
            (output, *_) = copy.deepcopy(model).to(device)(BATCH)
        found.append(output["instances"].to("cpu"))
    ours, theirs = found
    assert len(ours) == len(theirs) > 0
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bbox", "joint"])
def test_nothing_is_detected(name):
    model = tiny_model(SCORE_THRESH_TEST=0.999, **MODELS[name]).eval().to("cuda")
    with torch.no_grad():
        assert [len(output["instances"]) for output in model(BATCH)] == [0] * len(BATCH)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("lsnet", MODELS.values(), ids=MODELS)
def test_mixed_precision(lsnet, dtype):
    # Before training all points look alike, and eight bits would choose the negatives.
    keys = {"POLISH_NEGATIVES": 0} if dtype is torch.bfloat16 else {}
    model = tiny_model(**lsnet, **keys).to("cuda")
    with EventStorage(), torch.no_grad():
        expected = {k: v.item() for k, v in model(BATCH).items()}
        with torch.autocast("cuda", dtype=dtype):
            found = model(BATCH)
    assert all(loss.dtype is torch.float32 for loss in found.values())
    within = {torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]  # of 11 and 8 bits
    for name, loss in found.items():
        # Other points may be assigned to the objects, which the third stage starts from.
        of_third_stage = name.endswith(("_polish", "_quality", "_search", "_mask"))
        rel = 0.2 if of_third_stage and dtype is torch.bfloat16 else within
        assert loss.item() == pytest.approx(expected[name], rel=rel, abs=0.01), name
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loop = LSNetTrainLoop(
        model, [BATCH] * 8, torch.optim.SGD(model.parameters(), lr=1e-3), amp_dtype=dtype
    )
    loop.iter = 0
    with EventStorage():
        for _ in range(8):  # the first steps of float16 find its scale
            loop.run_step()
    after = model.state_dict()
    assert all(x.isfinite().all() for x in after.values())
    moved = sum(not torch.equal(before[k], after[k]) for k in before)
    assert moved > len(before) // 2
