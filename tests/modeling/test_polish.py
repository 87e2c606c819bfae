import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from tiny_model import make_input, tiny_cfg, tiny_model

from lsnet_d2.layers import PointSampler
from lsnet_d2.modeling.polish import Polish, Polished, PolishStep, build_polish

BOXES = [[10, 12, 60, 70], [70, 20, 120, 90], [30, 40, 44, 60]]
BRANCHES = ["extreme", "contour", "keypoint"]


def polished_model(**lsnet):
    return tiny_model(TASK="joint", BRANCHES=BRANCHES, POLISH_IN_FEATURES=["p3", "p4"], **lsnet)


def detecting_model(**lsnet):
    """Finds boxes around all points, from two cells above and left to two below and right."""
    model = polished_model(SCORE_THRESH_TEST=0.0, TOPK_CANDIDATES_TEST=50, **lsnet).eval()
    outwards = torch.zeros(5, 4)
    outwards[[0, 1, 2, 3], [0, 2, 1, 3]] = 2.0
    model.head.branches["bbox"].refine.out.bias.data = outwards.flatten()
    return model


def losses_of(model, inputs):
    with EventStorage():
        return model(inputs)


def one_step(num_landmarks=5, **keys):
    return PolishStep({"bbox": num_landmarks}, 8, 3, **keys)


def reading(feature, stride=4):
    return PointSampler([feature], [stride])


def test_nothing_moves_at_first():
    polish = one_step()
    landmarks = torch.rand(3, 5, 2) * 30
    features, image = reading(torch.randn(2, 8, 10, 10)), torch.tensor([0, 1, 1])
    ((moved, quality, *_),) = polish(features, image, [landmarks])
    torch.testing.assert_close(moved, landmarks)
    assert quality.shape == (3, 3)
    ((moved, quality, *_),) = polish(features, image[:0], [landmarks[:0]])
    assert moved.shape == (0, 5, 2) and quality.shape == (0, 3)


def test_moves_are_relative_to_the_size_of_the_object():
    torch.manual_seed(0)
    polish = one_step().eval()
    torch.nn.init.normal_(polish.branches["bbox"].out.weight)
    features, image = reading(torch.ones(1, 8, 100, 100)), torch.tensor([0, 0])
    landmarks = torch.rand(1, 5, 2) * 30 + 60
    both = torch.cat([landmarks, landmarks * 3])
    small, large = polish(features, image, [both])[0].landmarks - both
    assert small.abs().max() > 0.1
    torch.testing.assert_close(large, 3 * small, rtol=1e-4, atol=1e-4)


def test_the_first_branch_says_how_large_the_object_is():
    polish = PolishStep({"bbox": 4, "pose": 3}, 8, 3).eval()
    torch.nn.init.constant_(polish.branches["pose"].out.bias, 1.0)
    corners = torch.tensor([[0.0, 0.0], [30.0, 0.0], [30.0, 40.0], [0.0, 40.0]])
    boxes, poses = torch.stack([corners, 2 * corners]), torch.full((2, 3, 2), 20.0)
    _, pose = polish(reading(torch.ones(1, 8, 20, 20)), torch.tensor([0, 0]), [boxes, poses])
    # a tenth of the diagonals, 50 and 100 pixels
    expected = torch.tensor([5.0, 10.0])[:, None, None].expand(2, 3, 2)
    torch.testing.assert_close(pose.landmarks - poses, expected)


def test_branches_tell_each_other_what_they_see():
    torch.manual_seed(0)
    polish = PolishStep({"bbox": 4, "pose": 3}, 8, 3).eval()
    torch.nn.init.normal_(polish.branches["bbox"].out.weight)
    boxes, poses = torch.rand(1, 4, 2) * 10, torch.full((1, 3, 2), 30.0)
    plain, under_pose = torch.zeros(1, 8, 40, 40), torch.zeros(1, 8, 40, 40)
    under_pose[..., 30, 30] = 1.0
    before, after = (
        polish(reading(feature, 1), torch.tensor([0]), [boxes, poses])[0]
        for feature in (plain, under_pose)
    )
    assert (before.landmarks - after.landmarks).abs().max() > 1e-3
    assert (before.quality - after.quality).abs().max() > 1e-3


def test_each_step_starts_from_the_one_before():
    polish = Polish(["p2"], [4], [one_step() for _ in range(3)]).eval()
    features, image = [torch.ones(1, 8, 100, 100)], torch.tensor([0])
    landmarks = torch.rand(1, 5, 2) * 30 + 60
    for step in polish.steps:
        torch.nn.init.constant_(step.branches["bbox"].out.bias, 0.5)
    moved = [step.landmarks for (step,) in polish(features, image, [landmarks])]
    assert len(moved) == 3
    # a shape that is only shifted keeps its size, hence the length of its moves
    first = moved[0] - landmarks
    assert first.min() > 0.1
    for number, places in enumerate(moved, start=1):
        torch.testing.assert_close(places, landmarks + number * first, rtol=1e-4, atol=1e-3)


def test_the_last_step_may_be_made_again():
    def moves_of(**keys):
        """Of the first landmark, to the right in tenths of the object's size. The two steps go 0.2
        and 0.3."""
        model = detecting_model(POLISH_STEPS=2, **keys)
        for step, way in zip(model.polish.steps, (0.2, 0.3), strict=True):
            step.branches["pose"].out.bias.data[0] = way
        with torch.no_grad():
            points, predictions, fine = model.predict(torch.zeros(1, 3, 128, 128))
            chosen = torch.arange(20)
            before = [
                branch.decode(v[0][chosen], points.xy[chosen], points.strides[chosen])
                for branch, v in zip(model.branches, predictions.refine, strict=True)
            ]
            scores, classes = torch.ones(20), torch.zeros(20, dtype=torch.long)
            after, *_ = model.polished(fine, before, scores, classes)
        size = (before[0].amax(1) - before[0].amin(1)).norm(dim=1)
        return (after[2] - before[2])[:, 0, 0] / (0.1 * size)

    torch.testing.assert_close(moves_of(), torch.full((20,), 0.5), rtol=1e-4, atol=1e-4)
    again = moves_of(POLISH_REPEATS_TEST=2)
    torch.testing.assert_close(again, torch.full((20,), 1.1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid, seen", [(0, False), (2, True)])
def test_the_grid_sees_the_inside_of_the_object(grid, seen):
    torch.manual_seed(0)
    polish = one_step(4, grid=grid).eval()
    torch.nn.init.normal_(polish.branches["bbox"].out.weight)
    landmarks = torch.tensor([[[10.0, 20.0], [30.0, 20.0], [30.0, 50.0], [10.0, 50.0]]])
    plain, inside = torch.zeros(1, 8, 60, 60), torch.zeros(1, 8, 60, 60)
    # x, y of a quarter of the box's sides from its corners
    inside[0, :, [27, 27, 42, 42], [15, 25, 15, 25]] = 1.0
    before, after = (
        polish(reading(feature, 1), torch.tensor([0]), [landmarks])[0]
        for feature in (plain, inside)
    )
    assert before.landmarks.shape == (1, 4, 2)
    for one, other in zip(before[:2], after[:2], strict=True):
        assert ((one - other).abs().max() > 1e-3) == seen


@pytest.mark.parametrize("grid", [0, 3])
def test_every_branch_is_polished(grid):
    keys = {
        "KEYPOINT_SEARCH": True,
        "KEYPOINT_SEARCH_CONVS": 2,
        "CONTOUR_AREA_LOSS_WEIGHT": 6.0,
    }
    model = polished_model(POLISH_GRID=grid, **keys).train()
    losses = losses_of(model, [make_input(BOXES, [0, 1, 2]), make_input(BOXES[:1], [1])])
    for branch in ("bbox", "segm", "pose"):
        assert losses[f"loss_{branch}_polish"] > 0 and losses[f"loss_{branch}_quality"] > 0
    assert losses["loss_pose_search"] > 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_no_gradient_reaches_the_stages_before():
    model = polished_model().train()
    losses = losses_of(model, [make_input(BOXES, [0, 1, 2])])
    losses["loss_segm_polish"].backward()
    assert all(parameter.grad is None for parameter in model.head.parameters())
    for step in model.polish.steps:
        assert step.branches["segm"].out.weight.grad.abs().max() > 0


def test_areas_are_learned_in_every_step_where_contours_are_known():
    def losses(weight, contours_of):
        torch.manual_seed(0)
        model = polished_model(CONTOUR_AREA_LOSS_WEIGHT=weight, POLISH_STEPS=2).train()
        image = make_input(BOXES, [0, 1, 2])
        image["instances"].gt_contours[contours_of:] = torch.nan
        found = losses_of(model, [image])
        found["loss_segm_polish"].backward()
        grads = [s.branches["segm"].out.weight.grad for s in model.polish.steps]
        return {name: loss.item() for name, loss in found.items()}, grads

    none, both = losses(0.0, 3), losses(6.0, 3)
    assert both[0].pop("loss_segm_polish") > none[0].pop("loss_segm_polish") + 0.1
    assert both[0] == pytest.approx(none[0])
    for without, with_areas in zip(none[1], both[1], strict=True):
        assert with_areas.isfinite().all() and not torch.allclose(without, with_areas)
    assert losses(6.0, 0)[0]["loss_segm_polish"] == 0


@pytest.mark.parametrize("search", [False, True])
def test_images_without_objects_keep_all_parameters_in_the_graph(search):
    keys = {
        "KEYPOINT_SEARCH": search,
        "KEYPOINT_SEARCH_CONVS": 1,
        "CONTOUR_AREA_LOSS_WEIGHT": 6.0,
    }
    model = polished_model(POLISH_GRID=2, **keys).train()
    losses = losses_of(model, [make_input([], [])])
    assert losses["loss_segm_polish"] == losses["loss_pose_polish"] == 0
    assert losses["loss_segm_quality"] > 0  # of hard negatives
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "loss, key", [("polish", "POLISH"), ("quality", "QUALITY"), ("search", "KEYPOINT_SEARCH")]
)
def test_weights_of_the_losses(loss, key):
    inputs = [make_input(BOXES, [0, 1, 2])]
    once, twice = (
        losses_of(
            polished_model(KEYPOINT_SEARCH=True, **{f"{key}_LOSS_WEIGHT": weight}).train(), inputs
        )[f"loss_pose_{loss}"]
        for weight in (1.0, 2.0)
    )
    torch.testing.assert_close(twice, 2 * once)


def test_few_positives_teach_what_all_of_them_do():
    def values(**keys):
        model = polished_model(POLISH_NEGATIVES=0, **keys).train()
        losses = losses_of(model, [make_input(BOXES[:1], [0])])
        return {name: loss.item() for name, loss in losses.items()}

    every = values()
    assert values(POLISH_POSITIVES=1000) == pytest.approx(every)
    torch.manual_seed(0)
    few = [values(POLISH_POSITIVES=1) for _ in range(40)]
    assert {x["loss_segm_refine"] for x in few} == {every["loss_segm_refine"]}
    polish = torch.tensor([x["loss_segm_polish"] for x in few])
    assert polish.mean() == pytest.approx(every["loss_segm_polish"], rel=0.05)


def test_detections_are_moved_and_their_boxes_follow():
    model = detecting_model(NMS_THRESH_TEST=1.0)
    inputs = [make_input(BOXES, [0, 1, 2])]
    with torch.no_grad():
        (plain,) = model(inputs)
        for step in model.polish.steps:
            step.branches["bbox"].out.bias += torch.tensor([0.2, 0.0])
        (moved,) = model(inputs)
    plain, moved = plain["instances"], moved["instances"]
    assert len(moved) == len(plain)
    inside = (moved.pred_boxes.tensor[:, 2] < 127) & (plain.pred_boxes.tensor[:, 0] > 1)
    assert inside.any()
    shift = moved.pred_extreme_points[inside] - plain.pred_extreme_points[inside]
    assert (shift[..., 0] > 0).all() and shift[..., 1].abs().max() < 1e-3
    boxes = moved.pred_boxes.tensor[inside]
    torch.testing.assert_close(boxes[:, 0], moved.pred_extreme_points[inside][:, 1, 0])
    torch.testing.assert_close(moved.pred_contours, plain.pred_contours)


def test_maps_have_as_many_channels():
    shapes = {"p3": ShapeSpec(channels=64, stride=8), "p4": ShapeSpec(channels=32, stride=16)}
    with pytest.raises(ValueError, match=r"POLISH_IN_FEATURES is \['p3', 'p4'\].* as p3, 64"):
        build_polish(tiny_cfg(POLISH_IN_FEATURES=["p3", "p4"]), shapes, [])


def test_unknown_features_are_named():
    with pytest.raises(ValueError, match=r"POLISH_IN_FEATURES is \['p2'\].*p3, p4"):
        tiny_model(POLISH_IN_FEATURES=["p2"])
    with pytest.raises(ValueError, match=r"POLISH_IN_FEATURES is \['p4', 'p3'\]; the finest"):
        tiny_model(POLISH_IN_FEATURES=["p4", "p3"])
    with pytest.raises(ValueError, match="POLISH_STEPS is 0"):
        polished_model(POLISH_STEPS=0)
    with pytest.raises(ValueError, match="POLISH_GRID is -1"):
        polished_model(POLISH_GRID=-1)
    with pytest.raises(ValueError, match="POLISH_REPEATS_TEST is -1"):
        polished_model(POLISH_REPEATS_TEST=-1)
    with pytest.raises(ValueError, match="KEYPOINT_SEARCH_CONVS is -1"):
        polished_model(KEYPOINT_SEARCH_CONVS=-1)


def detect(model, **settings):
    """What it finds with other settings of its tests."""
    for name, value in settings.items():
        setattr(model, name, value)
    with torch.no_grad():
        return model([make_input(BOXES, [0, 1, 2])])[0]["instances"]


def test_scores_join_class_and_quality():
    model = detecting_model(NMS_THRESH_TEST=1.0)
    of_class = torch.tensor([1.0, 0.9, 0.8])
    for branch, quality in (("bbox", 0.5), ("segm", 0.25), ("pose", 0.125)):
        (step,) = model.polish.steps
        judge = step.branches[branch].quality
        torch.nn.init.zeros_(judge.weight)
        judge.bias.data.copy_(torch.logit(quality * of_class))
    plain, joined = (detect(model, test_quality_share=share) for share in (0.0, 0.3))
    assert len(plain) == len(joined) > 10
    assert torch.equal(plain.contour_scores, plain.scores)
    # sorted, since their order is another one
    for field, quality in (("scores", 0.5), ("contour_scores", 0.25), ("pose_scores", 0.125)):
        told = quality * of_class[plain.pred_classes]
        expected = plain.get(field) ** 0.7 * told**0.3
        torch.testing.assert_close(joined.get(field).sort().values, expected.sort().values)


def test_what_is_found_beside_better_ones_scores_less():
    """The same is found, in the order of the new scores, and those of all branches decay alike."""
    model = detecting_model()
    plain, decayed = (detect(model, test_soft_nms_sigma=sigma) for sigma in (0.0, 0.5))
    assert len(plain) == len(decayed) > 10
    boxes = plain.pred_boxes.tensor
    same = (decayed.pred_boxes.tensor[:, None] == boxes).all(dim=2)
    same &= decayed.pred_classes[:, None] == plain.pred_classes
    assert (same.sum(dim=1) == 1).all()
    before = plain[same.int().argmax(dim=1)]
    factor = decayed.scores / before.scores
    assert factor.max() == 1 and factor.min() < 0.9
    assert (decayed.scores.diff() <= 0).all()
    for field in ("contour_scores", "pose_scores"):
        torch.testing.assert_close(decayed.get(field), before.get(field) * factor)
    torch.testing.assert_close(decayed.pred_contours, before.pred_contours)


def test_detections_that_meet_are_one():
    """The third stage moves all of a class to one place."""
    model = detecting_model()

    class Meeting(torch.nn.Module):
        def forward(self, features, image, landmarks, heatmaps):
            return [
                Polished(x[:1].expand_as(x), torch.zeros(len(x), 3), None, None) for x in landmarks
            ]

    with torch.no_grad():
        model.polish.steps = torch.nn.ModuleList([Meeting()])
        (found,) = model([make_input(BOXES, [0, 1, 2])])
    classes = found["instances"].pred_classes.tolist()
    assert len(classes) == len(set(classes)) > 1


def test_boxes_are_clipped_before_they_are_compared():
    """As they are returned, also by ``detect``, which an exported model calls."""
    model = detecting_model()

    class Outwards(torch.nn.Module):
        def forward(self, features, image, landmarks, heatmaps):
            return [Polished(3 * x - 96, torch.zeros(len(x), 3), None, None) for x in landmarks]

    with torch.no_grad():
        model.polish.steps = torch.nn.ModuleList([Outwards()])
        image = model.preprocess_image([make_input(BOXES, [0, 1, 2])])
        boxes, *_, landmarks, _, _ = model.detect(*model.predict(image.tensor), 0, (96, 96))
    assert (landmarks[0] < 0).any() and (landmarks[0] > 96).any()
    assert boxes.amin() == 0 and boxes.amax() == 96


def test_each_image_is_looked_at_by_itself():
    """Results of a batch are those of its images alone."""
    model = detecting_model(POLISH_GRID=2)
    torch.manual_seed(0)
    (step,) = model.polish.steps
    for branch in step.branches.values():
        torch.nn.init.normal_(branch.out.weight)
        torch.nn.init.normal_(branch.quality.weight)
    images = [make_input(BOXES, [0, 1, 2], seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        together = [found["instances"] for found in model(images)]
        alone = [model([image])[0]["instances"] for image in images]
    for one, other in zip(together, alone, strict=True):
        assert len(one) == len(other) > 10
        torch.testing.assert_close(one.scores, other.scores)
        torch.testing.assert_close(one.pred_contours, other.pred_contours, rtol=0, atol=1e-2)
    assert not torch.allclose(alone[0].scores[:10], alone[1].scores[:10])


def test_features_are_read_at_the_strides_that_they_have():
    torch.manual_seed(0)
    polish = Polish(["p3", "p4"], [8, 16], [PolishStep({"bbox": 4}, 16, 3)]).eval()
    landmarks = torch.tensor([[[24.0, 40.0], [60, 60], [70, 60], [70, 70]]])

    def quality(level, row, column):
        maps = [torch.zeros(1, 8, 16, 16), torch.zeros(1, 8, 8, 8)]
        maps[level][..., row, column] = 1.0
        with torch.no_grad():
            return polish(maps, torch.tensor([0]), [landmarks])[-1][0].quality

    nothing = quality(0, 15, 15)
    assert not torch.allclose(quality(0, 5, 3), nothing)  # under the first landmark
    torch.testing.assert_close(quality(0, 3, 5), nothing)
    assert not torch.allclose(quality(1, 2, 1), nothing)  # 8 pixels beside it
    torch.testing.assert_close(quality(1, 5, 3), quality(1, 7, 7))


def test_no_gradient_flows_from_a_step_to_those_before():
    torch.manual_seed(0)
    polish = Polish(["p3"], [8], [PolishStep({"bbox": 4}, 8, 3) for _ in range(2)])
    for step in polish.steps:
        torch.nn.init.normal_(step.branches["bbox"].out.weight)
    landmarks = torch.rand(2, 4, 2) * 60
    last = polish([torch.randn(1, 8, 12, 12)], torch.tensor([0, 0]), [landmarks])[-1][0]
    (last.landmarks.sum() + last.quality.sum()).backward()
    first, second = (
        [p.grad.abs().max() for p in step.parameters() if p.grad is not None]
        for step in polish.steps
    )
    assert not first and max(second) > 0


def test_places_far_from_the_object_are_not_felt():
    """As those of a hard negative may be."""
    torch.manual_seed(0)
    polish = PolishStep({"bbox": 4, "pose": 1}, 8, 3).eval()
    torch.nn.init.normal_(polish.branches["bbox"].out.weight)
    corners = torch.tensor([[[0.0, 0.0], [30.0, 0.0], [30.0, 40.0], [0.0, 40.0]]])

    def moves(x):
        pose = torch.tensor([[[15.0 + 50 * x, 20.0]]])  # sizes from the middle
        with torch.no_grad():
            features = reading(torch.ones(1, 8, 400, 400))
            return polish(features, torch.tensor([0]), [corners, pose])[0].landmarks

    torch.testing.assert_close(moves(2.0), moves(20.0))
    assert not torch.allclose(moves(1.0), moves(2.0))


def test_the_config_says_how_scores_are_made_and_what_is_looked_at():
    model = polished_model(QUALITY_SHARE_TEST=0.7, SOFT_NMS_SIGMA_TEST=0.9, POLISH_GRID=4)
    assert (model.test_quality_share, model.test_soft_nms_sigma) == (0.7, 0.9)
    assert [len(step.grid) for step in model.polish.steps] == [16]


def test_hard_negatives_are_on_the_image_and_in_no_ignored_region(monkeypatch):
    model = tiny_model(POLISH_IN_FEATURES=["p3"]).train()
    plain, ignored = make_input([], []), make_input([], [])
    ignored["ignore_boxes"] = torch.tensor([[-1.0, -1.0, 200.0, 200.0]])
    assert losses_of(model, [plain])["loss_bbox_quality"] > 0
    assert losses_of(model, [ignored])["loss_bbox_quality"] == 0

    seen = []
    find = model.criterion.polish_criterion.find_negatives
    monkeypatch.setattr(
        model.criterion.polish_criterion,
        "find_negatives",
        lambda *args: seen.append(args[3]) or find(*args),
    )
    small = make_input([], [], size=(40, 70))
    losses_of(model, [plain, small])
    (background,) = seen
    points, *_ = model.predict(model.preprocess_image([plain, small]).tensor)
    for row, size in zip(background, [(96, 128), (40, 70)], strict=True):
        assert torch.equal(row, model.criterion.valid_points(points, size))
    assert not background[1].all()


def test_share_of_the_quality():
    with pytest.raises(ValueError, match="QUALITY_SHARE_TEST is 1.5"):
        polished_model(QUALITY_SHARE_TEST=1.5)
