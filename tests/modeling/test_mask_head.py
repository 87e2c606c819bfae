import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import make_input, tiny_cfg, tiny_model

from lsnet_d2.data.contours import resample_contour
from lsnet_d2.modeling import test_time_augmentation
from lsnet_d2.modeling.areas import Lattice, area_iou
from lsnet_d2.modeling.landmarks import clip_points, span_boxes
from lsnet_d2.modeling.mask_head import LatticeMasks, MaskHead
from lsnet_d2.modeling.test_time_augmentation import LSNetWithTTA, map_back

SEEDS = st.integers(0, 10_000)


def star(seed, vertices=36, radius=20.0, middle=(50.0, 40.0)):
    """(1, P, 2): a polygon that goes around its middle once."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.arange(vertices) * (2 * math.pi / vertices)
    lengths = radius * (0.7 + 0.3 * torch.rand(vertices, generator=generator))
    return (lengths[:, None] * torch.stack([angles.sin(), -angles.cos()], 1))[None] + torch.tensor(
        middle
    )


def drawn(polygons, count=28, extent=1.2):
    """The masks that someone makes who knows the polygons."""
    lattice = Lattice.over(polygons, count, extent)
    return LatticeMasks(lattice.depth(polygons), lattice)


class TestLatticeMasks:
    @given(SEEDS)
    def test_outlines_are_traced(self, seed):
        polygons = torch.cat([star(seed), star(seed + 1, radius=60.0)])
        traced = drawn(polygons).trace(36, torch.zeros(2, 36, 2))
        assert area_iou(traced, polygons).min() > 0.93

    def test_traced_contours_are_in_the_order_of_those_that_are_learned(self):
        polygons = star(0)
        (traced,) = drawn(polygons, count=100).trace(36, torch.zeros(1, 36, 2))
        learned = resample_contour([polygons[0].numpy()], 36)
        # the key vertices are not quite the same
        assert np.linalg.norm(traced.numpy() - learned, axis=1).max() < 8
        assert np.linalg.norm(traced[0].numpy() - learned[0]) < 2

    def test_holes_and_parts_are_traced(self):
        lattice = Lattice.over(torch.tensor([[[0.0, 0.0], [60.0, 30.0]]]), 28, 1.2)
        x, y = lattice.places.unbind(2)
        ring = 5 - ((x - 15).hypot(y - 15) - 10).abs()
        square = 5 - torch.maximum((x - 50).abs(), (y - 15).abs())
        masks = LatticeMasks(torch.maximum(ring, square), lattice)
        traced = masks.trace(64, torch.zeros(1, 36, 2))
        fine = Lattice.over(torch.tensor([[[0.0, 0.0], [60.0, 30.0]]]), 200)
        x, y = fine.places.unbind(2)
        true = (((x - 15).hypot(y - 15) - 10).abs() < 5) | (
            torch.maximum((x - 50).abs(), (y - 15).abs()) < 5
        )
        found = fine.covered(traced)
        assert (found & true).sum() / (found | true).sum() > 0.9
        hole = (x - 15).hypot(y - 15) < 4
        assert not found[hole].any()

    def test_where_nothing_is_covered_the_contour_stays(self):
        polygons = torch.cat([star(0), star(1)])
        masks = drawn(polygons)
        masks.logits[1] = -1.0
        before = star(3).expand(2, -1, -1)
        after = masks.trace(36, before)
        ious = area_iou(after, before), area_iou(after, polygons)
        assert ious[0][1] > 0.97 and ious[1][0] > 0.93
        assert masks[:0].trace(72, before[:0]).shape == (0, 72, 2)
        assert masks[:0].probabilities.shape == (0, 28, 28)

    def test_what_reaches_over_the_lattice_ends_near_its_border(self):
        lattice = Lattice.over(torch.tensor([[[0.0, 0.0], [28.0, 28.0]]]), 28)
        masks = LatticeMasks(torch.full((1, 28 * 28), 5.0), lattice)
        (traced,) = masks.trace(36, torch.zeros(1, 36, 2))
        assert span_boxes(traced).tolist() == pytest.approx([0, 0, 28, 28], abs=0.01)

    def test_iou(self):
        true = torch.tensor([[[0.0, 0.0], [0.0, 28.0], [28.0, 28.0], [28.0, 0.0]]])
        lattice = Lattice.over(true, 28)
        half = torch.tensor([[[0.0, 0.0], [0.0, 28.0], [14.0, 28.0], [14.0, 0.0]]])
        masks = LatticeMasks(lattice.depth(half), lattice)
        assert masks.iou(true).item() == pytest.approx(0.5)
        assert masks.iou(half).item() == 1
        nothing = LatticeMasks(-torch.ones(1, 28 * 28), lattice)
        assert nothing.iou(true + 100).item() == 0

    def test_iou_with_an_object_that_reaches_beyond_the_lattice(self):
        """A mask of a part, all that the lattice can show, is no mask of the whole."""
        true = 4 * torch.tensor([[[0.0, 0.0], [0.0, 28.0], [28.0, 28.0], [28.0, 0.0]]])
        lattice = Lattice.over(true / 4, 28)
        masks = LatticeMasks(torch.ones(1, 28 * 28), lattice)
        assert masks.iou(true).item() == pytest.approx(1 / 16)
        traced = masks.trace(36, true)
        assert area_iou(traced, true).item() == pytest.approx(1 / 16, abs=0.01)

    def test_loss(self):
        true = torch.tensor([[[0.0, 0.0], [0.0, 28.0], [14.0, 28.0], [14.0, 0.0]]])
        lattice = Lattice.over(torch.tensor([[[0.0, 0.0], [28.0, 28.0]]]), 28)
        covered = lattice.covered(true)
        assert covered.sum() == 28 * 14
        right = LatticeMasks(torch.where(covered, 30.0, -30.0), lattice)
        assert right.loss(true).item() == pytest.approx(0, abs=1e-5)
        # ln 2, and Dice with a half everywhere
        even = LatticeMasks(torch.zeros(1, 28 * 28), lattice)
        dice = (2 * 0.5 * 392 + 1) / (0.25 * 784 + 392 + 1)
        assert even.loss(true).item() == pytest.approx(math.log(2) + 1 - dice, rel=1e-5)

    def test_lattices_go_along_with_masks(self):
        polygons = torch.cat([star(0), star(1, middle=(200.0, 100.0))])
        masks = drawn(polygons)
        chosen = masks[torch.tensor([1])]
        torch.testing.assert_close(
            chosen.trace(36, polygons[1:]), masks.trace(36, polygons)[1:], rtol=0, atol=0
        )
        assert masks.probabilities.shape == (2, 28, 28)
        low, high = polygons.amin(1), polygons.amax(1)
        grown = torch.cat([low - 0.1 * (high - low), high + 0.1 * (high - low)], dim=1)
        torch.testing.assert_close(masks.lattice.boxes, grown)


class TestMaskHead:
    def setup_method(self):
        torch.manual_seed(0)
        self.head = MaskHead(32, 8, stride=4)
        torch.nn.init.normal_(self.head.filters.weight)
        self.features = torch.randn(2, 32, 20, 24)
        self.image = torch.tensor([1, 0, 1])
        contours = [star(0), star(1), star(2, radius=10.0, middle=(30.0, 30.0))]
        self.contours = torch.cat(contours)
        self.boxes = torch.cat([self.contours.amin(1), self.contours.amax(1)], dim=1)
        self.summary = torch.randn(3, 8)

    def masks(self, **changed):
        inputs = {
            "features": self.features,
            "image": self.image,
            "boxes": self.boxes,
            "summary": self.summary,
            "contours": self.contours,
        }
        return self.head(**{**inputs, **changed})

    def test_each_object_has_layers_of_its_own(self):
        masks = self.masks()
        maps = self.head.features(self.features)
        assert maps.shape == (2, 32, 40, 48)
        for number in range(3):
            places = masks.lattice.places[number]
            to = 2 * places / 2 / torch.tensor([47.0, 39.0]) - 1
            seen = F.grid_sample(maps[self.image[number]][None], to[None, None], align_corners=True)
            low, high = masks.lattice.boxes[number].chunk(2)
            depth = masks.lattice[number : number + 1].depth(self.contours[number : number + 1])
            values = torch.cat(
                [
                    seen[0, :, 0].T,
                    (places - low) / (high - low) - 0.5,
                    depth[0, :, None].clamp(-3, 3) / 3,
                ],
                dim=1,
            )
            filters = self.head.filters(self.summary[number])
            for inputs, outputs in ((35, 16), (16, 16), (16, 1)):
                weight, bias, filters = filters.split(
                    [inputs * outputs, outputs, len(filters) - (inputs + 1) * outputs]
                )
                values = values @ weight.view(inputs, outputs) + bias
                if outputs > 1:
                    values = values.relu()
            torch.testing.assert_close(masks.logits[number], values[:, 0], rtol=1e-3, atol=1e-2)

    def test_objects_see_their_own_image(self):
        features = self.features.clone()
        features[1] = 0
        before, after = self.masks().logits, self.masks(features=features).logits
        assert torch.equal(before[1], after[1])
        assert (before[[0, 2]] != after[[0, 2]]).any(1).all()

    def test_masks_teach_neither_boxes_nor_contours(self):
        inputs = {
            name: getattr(self, name).clone().requires_grad_()
            for name in ("features", "boxes", "summary", "contours")
        }
        self.masks(**inputs).loss(self.contours.flip(0)).sum().backward()
        assert inputs["boxes"].grad is None and inputs["contours"].grad is None
        for name in ("features", "summary"):
            assert inputs[name].grad.abs().sum() > 0

    def test_inference_without_no_grad(self):
        assert self.masks().trace(48, self.contours).shape == (3, 48, 2)

    def test_no_objects(self):
        none = torch.zeros(0, dtype=torch.long)
        masks = self.masks(
            image=none,
            boxes=self.boxes[none],
            summary=self.summary[none],
            contours=self.contours[none],
        )
        assert masks.logits.shape == (0, 784)
        masks.loss(self.contours[none]).sum().backward()
        assert all(p.grad is not None for p in self.head.parameters())

    def test_masks_are_learned_that_contours_miss(self):
        """Two limbs are seen; the contour goes around one of them."""
        torch.manual_seed(0)
        head = MaskHead(32, 8, stride=4)
        features = torch.zeros(1, 32, 16, 16)
        features[:, 0, 2:13, 3:5] = features[:, 0, 2:13, 9:11] = 1
        limb = torch.tensor([[10.0, 6.0], [10.0, 50.0], [18.0, 50.0], [18.0, 6.0]])
        other = limb + torch.tensor([24.0, 0.0])
        both = torch.cat([limb[:1], limb[1:], limb[:1], other[:1], other[1:], other[:1]])[None]
        boxes = torch.tensor([[10.0, 6.0, 42.0, 50.0]])
        summary, image = torch.ones(1, 8), torch.tensor([0])
        optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
        for _ in range(80):
            masks = head(features, image, boxes, summary, limb[None])
            optimizer.zero_grad()
            masks.loss(both).sum().backward()
            optimizer.step()
        masks = head(features, image, boxes, summary, limb[None])
        assert masks.iou(both).item() > 0.95
        assert masks.iou(limb[None]).item() == pytest.approx(0.5, abs=0.1)


JOINT = {"TASK": "joint", "BRANCHES": ["extreme", "contour", "keypoint"]}
BOXES = [[10, 12, 60, 70], [70, 20, 120, 90], [30, 40, 44, 60]]


class TestModel:
    def model(self, **lsnet):
        return tiny_model(POLISH_IN_FEATURES=["p3", "p4"], TRACED_POINTS=48, **JOINT, **lsnet)

    def test_contours_are_traced(self, monkeypatch):
        model = self.model(SCORE_THRESH_TEST=0.0, TOPK_CANDIDATES_TEST=20).eval()
        outwards = torch.zeros(5, 4)  # boxes of four cells
        outwards[[0, 1, 2, 3], [0, 2, 1, 3]] = 2.0
        model.head.branches["bbox"].refine.out.bias.data = outwards.flatten()
        kept = []
        trace = LatticeMasks.trace

        def keeping(masks, num_points, contours):
            kept.append(trace(masks, num_points, contours))
            return kept[-1]

        monkeypatch.setattr(LatticeMasks, "trace", keeping)
        with torch.no_grad():
            (output,) = model([{**make_input(BOXES, [0, 1, 2]), "height": 192, "width": 256}])
        found = output["instances"]
        assert found.pred_contours.shape == (len(found), 48, 2) and len(found) > 5
        torch.testing.assert_close(found.pred_contours, clip_points(2 * kept[0], (192, 256)))
        assert found.pred_masks.contours is found.pred_contours

    def test_nothing_is_found(self):
        model = self.model(SCORE_THRESH_TEST=0.999).eval()
        with torch.no_grad():
            (output,) = model([make_input(BOXES, [0, 1, 2])])
        assert output["instances"].pred_contours.shape == (0, 48, 2)

    def test_masks_are_learned_from_positives(self):
        inputs = [make_input(BOXES, [0, 1, 2])]
        losses = {}
        for weight in (1.0, 3.0):
            model = self.model(MASK_LOSS_WEIGHT=weight)
            with EventStorage():
                losses[weight] = model(inputs)["loss_segm_mask"]
        # about ln 2 and the Dice of even chances, before training
        assert 0.5 < losses[1.0].item() < 3
        torch.testing.assert_close(losses[3.0], 3 * losses[1.0])
        losses[3.0].backward()
        assert all(p.grad is not None for p in model.polish.masks["segm"].parameters())

    def test_without_a_third_stage_there_are_none(self):
        model = tiny_model(TRACED_POINTS=48, SCORE_THRESH_TEST=0.0, **JOINT).eval()
        with torch.no_grad():
            (output,) = model([make_input(BOXES, [0, 1, 2])])
        assert output["instances"].pred_contours.shape[1:] == (36, 2)

    def test_traced_contours_do_not_vote(self, monkeypatch):
        cfg = tiny_cfg(
            POLISH_IN_FEATURES=["p3"], TRACED_POINTS=48, TASK="segm", SCORE_THRESH_TEST=0.0
        )
        cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = [96], True
        cfg.INPUT.CONTOUR_SAMPLING = "reference"
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        brought = []

        def keeping(*arguments):
            brought.append(map_back(*arguments).pred_contours)
            return map_back(*arguments)

        monkeypatch.setattr(test_time_augmentation, "map_back", keeping)
        with torch.no_grad():
            (output,) = LSNetWithTTA(cfg, model)([make_input(BOXES, [0, 1, 2])])
        found = output["instances"]
        assert len(found) > 5 and found.pred_contours.shape[1:] == (48, 2)
        # None is a mean: each is one of those that were found in either image.
        distance = (found.pred_contours[:, None] - torch.cat(brought)).abs().amax((2, 3))
        assert distance.amin(1).max() < 1e-3
