import itertools
import warnings

import numpy as np
import pytest
import torch
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from lsnet_d2.data.serialization import pack, unpack
from lsnet_d2.data.train_loader import TrainingLoader


def make_instances():
    instances = Instances((4, 6))
    instances.gt_boxes = Boxes(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    instances.gt_classes = torch.tensor([2])
    instances.gt_known = torch.tensor([True])
    instances.gt_keypoints = Keypoints(torch.rand(1, 5, 3))
    instances.gt_bits = BitMasks(torch.rand(1, 4, 6) > 0.5)
    instances.gt_masks = PolygonMasks([[np.array([0.0, 1.0, 2.0, 1.0, 2.0, 3.0])]])
    return instances


def make_example(record):
    image = torch.arange(72, dtype=torch.uint8).view(4, 6, 3).permute(2, 0, 1)  # not contiguous
    return {"file_name": "a.jpg", "image": image, "instances": make_instances(), "more": [None]}


def check(arrived):
    torch.manual_seed(0)
    example = make_example({})
    assert set(arrived) >= set(example)
    assert arrived["file_name"] == "a.jpg" and arrived["more"] == [None]
    assert arrived["image"].dtype == torch.uint8 and arrived["image"].equal(example["image"])
    found, sent = arrived["instances"], example["instances"]
    assert isinstance(found, Instances) and found.image_size == (4, 6)
    for name in ("gt_boxes", "gt_keypoints", "gt_bits"):
        assert type(found.get(name)) is type(sent.get(name))
        assert found.get(name).tensor.equal(sent.get(name).tensor)
    assert found.gt_classes.equal(sent.gt_classes) and found.gt_known.equal(sent.gt_known)
    assert np.array_equal(found.gt_masks.polygons[0][0], sent.gt_masks.polygons[0][0])


def test_what_arrives_is_what_was_sent():
    torch.manual_seed(0)
    piece = pack(make_example({}))
    assert piece.dtype == torch.uint8 and piece.dim() == 1
    check(unpack(piece))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_through_a_loader(num_workers):
    def mapper(record):
        torch.manual_seed(0)
        return make_example(record)

    loader = TrainingLoader(
        [{"width": 6, "height": 4}] * 3,
        mapper,
        lambda seed: TrainingSampler(3, seed=seed),
        batch_size=2,
        seed=1,
        num_workers=num_workers,
    )
    for example in itertools.chain.from_iterable(itertools.islice(loader, 2)):
        check(example)


@pytest.mark.parametrize("shape", [(2, 2), (300, 300)])
@pytest.mark.parametrize("turned", [False, True])
def test_what_arrives_can_be_changed(shape, turned):
    image = torch.zeros(shape)
    with warnings.catch_warnings(action="error"):  # torch would warn of an array to be read only
        arrived = unpack(pack({"image": image.T if turned else image}))
    arrived["image"] += 1
    assert arrived["image"].equal(torch.ones(shape))


def test_empty_tensors():
    arrived = unpack(pack({"boxes": torch.zeros(0, 4), "keypoints": torch.zeros(0, 17, 3)}))
    assert arrived["boxes"].shape == (0, 4) and arrived["keypoints"].shape == (0, 17, 3)


@pytest.mark.parametrize(
    "value",
    [
        torch.rand(3, 2).bfloat16(),
        torch.rand(3, 2, dtype=torch.complex64).conj(),
        torch.rand(3, 2).requires_grad_(),
        torch.nn.Parameter(torch.rand(3, 2)),
        torch.eye(3).to_sparse(),
    ],
    ids=["bfloat16", "conjugate", "gradient", "parameter", "sparse"],
)
def test_what_numpy_does_not_have_arrives_too(value):
    arrived = unpack(pack({"value": value}))["value"]
    assert type(arrived) is type(value) and arrived.dtype == value.dtype
    assert arrived.requires_grad == value.requires_grad and arrived.layout == value.layout
    assert arrived.to_dense().equal(value.to_dense())


def test_a_view_is_sent_without_the_rest():
    whole = torch.zeros(1000, 1000)
    assert len(pack({"part": whole[:2]})) < 9000
