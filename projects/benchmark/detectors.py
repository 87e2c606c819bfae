"""The models that are measured, with random weights that make the work of trained ones."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import FCOS, GeneralizedRCNN, RetinaNet, build_model
from straight_port import straight_port
from torch import Tensor, nn

from lsnet_d2.config_file import load_config
from lsnet_d2.layers import ModulatedDeformConv
from lsnet_d2.modeling import LSNet
from lsnet_d2.modeling.backbone import FoldedConv2d
from lsnet_d2.modeling.vectors import encode_vectors

CANDIDATES = 1000  # scores of an image above the threshold
DETECTIONS = 20  # of an image, at most; COCO has 7.3 objects, and a detector finds some twice

# In cells: how far sampling places scatter, and how long the landmarks are.
_SCATTER = 1.0
_LENGTH = 2.0


def build(
    name: str, config_file: str, image: dict, *, device: str = "cpu", seed: int = 0
) -> nn.Module:
    """A model of :data:`DETECTORS` for inference.

    Weights are random, and three things are set so that there is as much to do as in a trained
    model: where LSNet samples (:func:`scatter`), the statistics of the backbone's batch norms, and
    how many scores of the image are above the threshold (:data:`CANDIDATES`) and how many
    detections are left (:data:`DETECTIONS`), on which the masks and poses of R-CNNs work.

    Args:
        config_file: of an LSNet; the others are Detectron2's own.
        image: an input of the model.
        device: of the model.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    model = DETECTORS[name](config_file).eval().to(device)
    set_statistics(model, image)
    limit_detections(model, image)
    return model


def _lsnet(config_file: str, *opts: str) -> LSNet:
    opts = ["MODEL.DEVICE", "cpu", *opts]
    model = build_model(load_config(config_file, opts, need_data_sets=False))
    scatter(model)
    return model


def _from_zoo(config: str) -> nn.Module:
    cfg = model_zoo.get_config(config)
    if config.endswith(".py"):
        return instantiate(cfg.model)
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


DETECTORS: dict[str, Callable[[str], nn.Module]] = {
    "lsnet": _lsnet,
    "lsnet_conv_tower": lambda config: _lsnet(config, "MODEL.LSNET.TOWER_CONV", "conv"),
    "straight_port": lambda config: straight_port(_lsnet(config)),
    "retinanet": lambda _: _from_zoo("COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
    "fcos": lambda _: _from_zoo("COCO-Detection/fcos_R_50_FPN_1x.py"),
    "mask_rcnn": lambda _: _from_zoo("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"),
    "keypoint_rcnn": lambda _: _from_zoo("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"),
}


@torch.no_grad()
def scatter(model: LSNet) -> None:
    """Let a fresh model look at as many different places as a trained one.

    Deformable convolutions start without offsets, and all initial landmarks alike, so that
    neighbours read the same memory, which is faster. Landmarks are laid around the anchor points.
    """
    for module in model.modules():
        if isinstance(module, ModulatedDeformConv):
            _randomize(module.conv_offset)
    for layers in model.head.branches.values():
        _randomize(layers.init_out)
        count = layers.branch.num_landmarks
        angle = torch.arange(count) / count * 2 * math.pi
        around = torch.stack([-angle.sin(), -angle.cos()], dim=1)  # from the top, as contours run
        vectors = encode_vectors(_LENGTH * torch.cat([around, torch.zeros(1, 2)]))
        layers.init_out.bias[: layers.vector_channels] = vectors.flatten()


def _randomize(conv: nn.Conv2d) -> None:
    # mean square of the inputs, after a group norm and ReLU: about 1/2
    nn.init.normal_(conv.weight, std=_SCATTER * (2 / conv.weight[0].numel()) ** 0.5)


@torch.no_grad()
def set_statistics(model: nn.Module, image: dict) -> None:
    """Give the batch norms with fixed statistics those of the image.

    With the ones that they start with, activations grow from block to block, proposals leave the
    image, and there is nothing to do behind them.
    """

    def take(norm: nn.Module, features: Tensor) -> None:
        variance, mean = torch.var_mean(features, dim=(0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    def take_behind(conv: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        """What a norm that is folded into its convolution would be given."""
        take(conv.norm, conv._conv_forward(inputs[0], conv.weight, conv.bias))

    hooks = [
        module.register_forward_pre_hook(take_behind)
        if isinstance(module, FoldedConv2d)
        else module.register_forward_pre_hook(lambda norm, inputs: take(norm, inputs[0]))
        for module in model.modules()
        if isinstance(module, FoldedConv2d | FrozenBatchNorm2d)
    ]
    model([image])
    for hook in hooks:
        hook.remove()


@dataclass(frozen=True)
class _Scoring:
    """How a meta-architecture comes to its detections.

    Attributes:
        classifier: the part that predicts classes.
        scores: what its output stands for, tensors of any shape.
        owner: what has ``test_score_thresh`` and the attribute ``limit``, the number of detections.
    """

    classifier: Callable[[nn.Module], nn.Module]
    scores: Callable[[Any], list[Tensor]]
    owner: Callable[[nn.Module], nn.Module] = lambda model: model
    limit: str = "max_detections_per_image"


_SCORING = {
    LSNet: _Scoring(lambda model: model.head, lambda out: [out.logits.sigmoid()]),
    RetinaNet: _Scoring(lambda model: model.head, lambda out: [x.sigmoid() for x in out[0]]),
    FCOS: _Scoring(
        lambda model: model.head,
        lambda out: [
            (x.sigmoid() * y.sigmoid()).sqrt() for x, y in zip(out[0], out[2], strict=True)
        ],
    ),
    GeneralizedRCNN: _Scoring(
        lambda model: model.roi_heads.box_predictor,
        lambda out: [out[0].softmax(dim=1)[:, :-1]],
        lambda model: model.roi_heads.box_predictor,
        "test_topk_per_image",
    ),
}


@torch.no_grad()
def limit_detections(model: nn.Module, image: dict) -> None:
    """Set the threshold of scores so that the candidates of the image are :data:`CANDIDATES`, or
    all that there are, and the number of detections."""
    scoring = _SCORING[type(model)]
    scores = []

    def record(_module: nn.Module, _inputs: tuple, output: object) -> None:
        scores.extend(x.flatten() for x in scoring.scores(output))

    hook = scoring.classifier(model).register_forward_hook(record)
    model([image])
    hook.remove()
    scores = torch.cat(scores)
    count = min(CANDIDATES, len(scores) - 1)
    owner = scoring.owner(model)
    owner.test_score_thresh = scores.topk(count + 1).values[-1].item()
    setattr(owner, scoring.limit, DETECTIONS)
