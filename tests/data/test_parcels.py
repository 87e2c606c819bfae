import pickle

import torch
from detectron2.structures import Boxes, Instances

from lsnet_d2.data.parcels import pack, unpack


def test_what_arrives_is_what_was_sent():
    instances = Instances((4, 6))
    instances.gt_boxes = Boxes(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    instances.gt_classes = torch.tensor([2])
    instances.gt_known = torch.tensor([True])
    image = torch.arange(72, dtype=torch.uint8).view(4, 6, 3).permute(2, 0, 1)  # not contiguous
    example = {"file_name": "a.jpg", "image": image, "instances": instances, "more": [None, 1.5]}

    arrived = unpack(pack(example))

    assert arrived["file_name"] == "a.jpg" and arrived["more"] == [None, 1.5]
    assert arrived["image"].dtype == torch.uint8 and arrived["image"].equal(image)
    found = arrived["instances"]
    assert isinstance(found, Instances) and found.image_size == (4, 6)
    assert found.gt_boxes.tensor.equal(instances.gt_boxes.tensor)
    assert found.gt_classes.equal(instances.gt_classes) and found.gt_known.equal(instances.gt_known)


def test_what_arrives_can_be_changed():
    arrived = unpack(pack({"image": torch.zeros(2, 2)}))
    arrived["image"] += 1
    assert arrived["image"].equal(torch.ones(2, 2))


def test_empty_tensors():
    arrived = unpack(pack({"boxes": torch.zeros(0, 4), "keypoints": torch.zeros(0, 17, 3)}))
    assert arrived["boxes"].shape == (0, 4) and arrived["keypoints"].shape == (0, 17, 3)


def test_it_needs_little_room():
    """A view of a large tensor is sent without the rest of it."""
    whole = torch.zeros(1000, 1000)
    assert len(pack({"part": whole[:2]})) < 9000
    assert len(pickle.dumps(whole)) > 4_000_000
