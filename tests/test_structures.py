import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer

from lsnet_d2.structures import ContourMasks

TRIANGLE = [[0.0, 0.0], [0.0, 8.0], [8.0, 8.0]]
SQUARE = [[2.0, 2.0], [2.0, 6.0], [6.0, 6.0]]


@pytest.fixture
def masks():
    return ContourMasks(torch.tensor([TRIANGLE, SQUARE]), (10, 12))


def test_bitmaps_are_those_of_the_contours(masks):
    assert masks.tensor.shape == (2, 10, 12) and masks.tensor.dtype == torch.bool
    assert masks.tensor[0].sum() == pytest.approx(8 * 8 / 2, abs=4)
    assert torch.equal(torch.stack(list(masks)), masks.tensor)
    assert np.array_equal(np.asarray(masks), masks.tensor.numpy())


def test_indexing(masks):
    assert torch.equal(masks[1], masks.tensor[1])
    assert torch.equal(masks[np.int64(1)], masks.tensor[1])
    assert torch.equal(masks[torch.tensor([0.1, 0.9]).argmax()], masks.tensor[1])
    assert torch.equal(masks[torch.tensor([False, True])].tensor, masks.tensor[1:])
    assert len(masks[:0]) == 0 and masks[:0].tensor.shape == (0, 10, 12)


def test_boxes_and_cat(masks):
    assert masks.get_bounding_boxes().tensor.tolist() == [[0, 0, 8, 8], [2, 2, 6, 6]]
    assert torch.equal(ContourMasks.cat([masks, masks[:1]]).tensor[2], masks.tensor[0])


def test_stands_for_a_field_of_instances(masks):
    instances = Instances((10, 12), pred_masks=masks, scores=torch.tensor([0.2, 0.9]))
    best = instances[instances.scores > 0.5].to("cpu")
    assert torch.equal(best.pred_masks.tensor, masks.tensor[1:])
    both = Instances.cat([best, instances])
    assert len(both.pred_masks) == 3
    image = np.zeros((10, 12, 3), dtype=np.uint8)
    drawn = Visualizer(image).draw_instance_predictions(instances).get_image()
    assert drawn[7, 1].any() and not drawn[1, 10].any()


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 2), (1, 4, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="contours must be"):
        ContourMasks(torch.zeros(shape), (10, 10))
