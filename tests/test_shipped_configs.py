"""Every config that is shipped: its model takes a training step and looks at a picture."""

import math
from functools import cache

import pytest
import tiny_coco
import torch
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

from lsnet_d2.config_file import load_config, merge_config, num_classes
from lsnet_d2.engine import LSNetTrainer

CONFIGS = tiny_coco.ROOT / "configs"
# what can be put on any config, and is none by itself
FRAGMENTS = ["Base-TTA.yaml", "Base-TTA-Flip.yaml"]
SIZE = 128


def names(base):
    """Paths below configs/; a file named Base-... describes no model of its own."""
    files = sorted(CONFIGS.glob("**/*.yaml"))
    return [str(f.relative_to(CONFIGS)) for f in files if f.name.startswith("Base-") == base]


def parameters():
    slow = pytest.mark.slow
    return [pytest.param(name, marks=slow) if "101" in name else name for name in names(False)]


@cache
def polygon(num_points, x1, y1, x2, y2):
    """On an ellipse in a box, counter-clockwise on the screen from its top."""
    angles = torch.arange(num_points) / num_points * 2 * math.pi
    circle = torch.stack([-angles.sin(), -angles.cos()], dim=1)
    center = torch.tensor([x1 + x2, y1 + y2]) / 2
    return center + circle * torch.tensor([x2 - x1, y2 - y1]) / 2


def make_input(cfg):
    """A picture of noise and two objects with the ground truth of all detectors."""
    boxes = [(10.0, 12.0, 70.0, 90.0), (50.0, 40.0, 120.0, 110.0)]
    lsnet = cfg.MODEL.META_ARCHITECTURE == "LSNet"
    num_keypoints = (cfg.MODEL.LSNET if lsnet else cfg.MODEL.ROI_KEYPOINT_HEAD).NUM_KEYPOINTS
    instances = Instances((SIZE, SIZE))
    instances.gt_boxes = Boxes(torch.tensor(boxes))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    contours = [polygon(cfg.MODEL.LSNET.NUM_CONTOUR_POINTS, *box) for box in boxes]
    instances.gt_contours = torch.stack(contours)
    instances.gt_extreme_points = torch.stack([polygon(4, *box) for box in boxes])
    instances.gt_masks = PolygonMasks([[c.flatten().double().numpy()] for c in contours])
    points = torch.stack([polygon(num_keypoints, *box) for box in boxes])
    instances.gt_keypoints = Keypoints(torch.cat([points, torch.full_like(points[..., :1], 2)], 2))
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": SIZE, "width": SIZE}


@pytest.mark.parametrize("name", parameters())
def test_trains_and_predicts(name):
    cfg = load_config(str(CONFIGS / name), ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    model = LSNetTrainer.build_model(cfg)
    assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE
    assert getattr(model, "roi_heads", model).num_classes == num_classes(cfg)
    optimizer = LSNetTrainer.build_optimizer(cfg, model)
    example = make_input(cfg)

    model.train()
    with EventStorage():
        losses = model([example])
    sum(losses.values()).backward()
    assert all(math.isfinite(loss.item()) for loss in losses.values()), losses
    # maps of the pyramid that nothing looks at, which the model knows of
    idle = tuple(f"backbone.top_block.{name}." for name in getattr(model, "unused_features", ()))
    trained = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not (idle and name.startswith(idle))
    ]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(p.grad.any() for p in trained)
    before = [p.detach().clone() for p in trained]
    optimizer.step()
    assert not all(torch.equal(p, old) for p, old in zip(trained, before, strict=True))

    model.eval()
    model.test_score_thresh = 0.0  # of LSNet and RetinaNet; weights are random
    with torch.no_grad():
        (result,) = model([example])
    # which of the boxes of a random network have an area, is a matter of chance
    instances = result["instances"]
    assert len(instances) <= cfg.TEST.DETECTIONS_PER_IMAGE
    assert instances.scores.isfinite().all() and instances.pred_boxes.nonempty().all()
    for branch in getattr(model, "branches", []):
        landmarks = instances.get(branch.pred_field)
        assert landmarks.isfinite().all()
        assert len(landmarks) == len(instances) and landmarks.shape[1] == (
            branch.traced_points or branch.num_landmarks
        )


@pytest.mark.parametrize("name", [n for n in names(True) if n not in FRAGMENTS])
def test_bases_are_valid(name):
    load_config(str(CONFIGS / name), ["MODEL.DEVICE", "cpu"])


@pytest.mark.parametrize("name", [n for n in names(False) + names(True) if "quick" not in n])
def test_is_short_and_names_its_output(name):
    text = (CONFIGS / name).read_text()
    base = name.rpartition("/")[2].startswith("Base-")
    assert base or len(text.splitlines()) <= 20
    assert base or f'OUTPUT_DIR: "output/{name.removesuffix(".yaml")}"' in text


# Epochs and steps of the released configs.
SCHEDULES = {
    "1x": (12, (8, 11)),
    "2x": (24, (16, 22)),
    "30e": (30, (28,)),
    "60e": (60, (54, 56)),
    "24e": (24, (12, 20)),
}


@pytest.mark.parametrize(
    "name", [n for n in names(False) if n.startswith(("bbox/", "segm/", "pose/"))]
)
def test_the_papers_schedules_are_the_released_ones(name):
    cfg = load_config(str(CONFIGS / name), need_data_sets=False)
    pose = name.startswith("pose/")
    # images with objects, or with people who have keypoints; eight GPUs
    images, batch = (64_115, 8 * 6) if pose else (117_266, 8 * 2)
    parts = name.removesuffix(".yaml").split("_")
    epochs, steps = SCHEDULES[next(part for part in parts if part in SCHEDULES)]
    solver = cfg.SOLVER
    epoch = images / solver.IMS_PER_BATCH
    assert pytest.approx(epochs * epoch, rel=1e-3) == solver.MAX_ITER
    assert pytest.approx([step * epoch for step in steps], rel=1e-3) == solver.STEPS
    ratio = batch / solver.IMS_PER_BATCH
    assert pytest.approx(0.01 / ratio, rel=2e-3) == solver.BASE_LR
    assert (500 * ratio, 0.001) == (solver.WARMUP_ITERS, solver.WARMUP_FACTOR)
    assert (solver.OPTIMIZER, solver.MOMENTUM, solver.GAMMA) == ("SGD", 0.9, 0.1)
    assert solver.WEIGHT_DECAY == solver.WEIGHT_DECAY_NORM == 1e-4
    assert solver.WEIGHT_DECAY_BIAS in (None, 1e-4) and solver.BIAS_LR_FACTOR == 1
    clip = solver.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 35)


OTHERS = [str(f) for f in tiny_coco.ROOT.glob("projects/*/configs/[!B]*.yaml")]


@pytest.mark.parametrize("name", [*names(False), *OTHERS], ids=lambda n: n.rpartition("/")[2])
def test_schedule_is_that_of_the_batch(name):
    solver = merge_config(str(CONFIGS / name)).SOLVER
    assert solver.REFERENCE_IMS_PER_BATCH == solver.IMS_PER_BATCH


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_augmentation_can_be_put_on_any_config(fragment, tmp_path):
    path = tmp_path / "both.yaml"
    below = CONFIGS / "segm" / "lsnet_R_50_FPN_1x.yaml"
    path.write_text(f"_BASE_: ['{below}', '{CONFIGS / fragment}']\n")
    both, alone = (load_config(str(p), ["MODEL.DEVICE", "cpu"]) for p in (path, below))
    assert both.TEST.AUG.ENABLED and both.TEST.AUG.FLIP
    both.TEST.AUG = alone.TEST.AUG
    assert both == alone


def test_augmentation_is_that_of_the_released_configs():
    augmentation = load_config(str(CONFIGS / "bbox" / "lsnet_R_50_FPN_ms_2x_tta.yaml")).TEST.AUG
    assert augmentation.MAX_SIZE == 3000
    sizes = zip(augmentation.MIN_SIZES, augmentation.SIZE_RANGES, strict=True)
    assert [(size, *r) for size, r in sizes] == [
        *[(400, 96, 10000), (500, 96, 10000)],
        *[(600, 64, 10000), (640, 64, 10000), (700, 64, 10000)],
        *[(900, 0, 10000), (1000, 0, 10000)],
        *[(1100, 0, 256), (1200, 0, 256), (1300, 0, 192), (1400, 0, 192), (1800, 0, 96)],
    ]
    flip = load_config(str(CONFIGS / "pose" / "lsnet_bbox_R_50_FPN_ms_2x_flip.yaml")).TEST.AUG
    assert (flip.MIN_SIZES, flip.MAX_SIZE, flip.SIZE_RANGES) == ((800,), 1333, [])
