"""A small LSNet on random features, for tests that need a whole model in milliseconds."""

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.structures import Boxes, Instances, Keypoints
from torch import nn

from lsnet_d2 import add_lsnet_config


@BACKBONE_REGISTRY.register()
class TinyPyramid(Backbone):
    """Five maps with strides 8 to 128 and 64 channels, each from the one before."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 8, stride=8)
        self.down = nn.ModuleList(nn.Conv2d(64, 64, 3, stride=2, padding=1) for _ in range(4))

    def forward(self, image):
        features = {"p3": self.stem(image).relu()}
        for level, conv in enumerate(self.down, start=4):
            features[f"p{level}"] = conv(features[f"p{level - 1}"]).relu()
        return features

    def output_shape(self):
        return {f"p{i}": ShapeSpec(channels=64, stride=2**i) for i in range(3, 8)}

    @property
    def size_divisibility(self):
        return 32


def tiny_cfg(**lsnet):
    cfg = get_cfg()
    add_lsnet_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "LSNet"
    cfg.MODEL.BACKBONE.NAME = "TinyPyramid"
    cfg.MODEL.LSNET.NUM_CLASSES = 3
    cfg.MODEL.LSNET.NUM_KEYPOINTS = NUM_KEYPOINTS
    for key, value in lsnet.items():
        cfg.MODEL.LSNET[key] = value
    return cfg


def tiny_model(seed=0, **lsnet):
    torch.manual_seed(seed)
    return build_model(tiny_cfg(**lsnet))


NUM_KEYPOINTS = 5


def make_input(boxes, classes, size=(96, 128), seed=0):
    """A random image with objects that have the landmarks of all branches.

    Extreme points are the middles of the boxes' sides, contours have 36 points on an ellipse in the
    box, and the five keypoints are the middles of the sides and the box's centre.
    """
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    x1, y1, x2, y2 = boxes.unbind(1)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    instances = Instances(size)
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    sides = torch.stack([x, y1, x1, y, x, y2, x2, y], dim=1).view(-1, 4, 2)
    instances.gt_extreme_points = sides
    angles = torch.arange(36) / 36 * 2 * torch.pi
    circle = torch.stack([-angles.sin(), -angles.cos()], dim=1)
    centers, radii = torch.stack([x, y], dim=1), torch.stack([x2 - x, y2 - y], dim=1)
    instances.gt_contours = centers[:, None] + radii[:, None] * circle
    points = torch.cat([sides, centers[:, None]], dim=1)
    visibility = torch.full((len(boxes), NUM_KEYPOINTS, 1), 2.0)
    instances.gt_keypoints = Keypoints(torch.cat([points, visibility], dim=2))
    image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": size[0], "width": size[1]}
