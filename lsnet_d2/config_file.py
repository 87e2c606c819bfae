"""From a config file and command-line options to a checked config."""

import logging
import os
import re

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from .config import add_lsnet_config
from .errors import ConfigError, did_you_mean
from .modeling import build_branches

logger = logging.getLogger(__name__)

SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
CLIP_TYPES = ("full_model", "value", "norm")


def load_config(config_file: str, opts: list[str] = ()) -> CfgNode:
    """Defaults, then the file, then ``KEY VALUE`` pairs; checked, with a device that exists.

    Where neither the file nor the options name a device, ``MODEL.DEVICE`` is "auto".

    Args:
        config_file: a YAML file, with ``_BASE_`` as in Detectron2. Empty: defaults only.
        opts: keys and values in turn.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a value of the wrong type, or one that
            :func:`check_config` refuses. The message names the file and the key.
    """
    cfg = get_cfg()
    add_lsnet_config(cfg)
    cfg.MODEL.DEVICE = "auto"
    if config_file:
        _merge_file(cfg, config_file)
    _merge_opts(cfg, list(opts))
    cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
    check_config(cfg)
    return cfg


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    if not os.path.isfile(config_file):
        raise ConfigError(f"no such config file: {config_file}")
    try:
        # Detectron2's default runs Python expressions that a file may contain
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except OSError as error:
        raise ConfigError(f"{config_file}: cannot read {error.filename or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{config_file}: not a plain YAML file: {error}") from error
    except KeyError as error:
        match = re.search(r"Non-existent config key: ([\w.]+)", str(error))
        if not match:
            raise
        key = match.group(1)
        raise ConfigError(
            f"{config_file}: unknown config key {key}{did_you_mean(key, _keys(cfg))}"
        ) from error
    except ValueError as error:  # the type of a value; the message names the key
        raise ConfigError(f"{config_file}: {error}") from error


def _merge_opts(cfg: CfgNode, opts: list[str]) -> None:
    flags = [opt for opt in opts if opt.startswith("--")]
    if flags:
        raise ConfigError(f"{flags[0]} must stand before the KEY VALUE pairs")
    if len(opts) % 2:
        raise ConfigError(f"options must be KEY VALUE pairs separated by a space, not {opts}")
    known = _keys(cfg)
    for key in opts[::2]:
        if key not in known:
            raise ConfigError(f"unknown config key {key}{did_you_mean(key, known)}")
    try:
        cfg.merge_from_list(opts)
    except ValueError as error:
        raise ConfigError(f"command line: {error}") from error


def _keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for name, value in cfg.items():
        keys += _keys(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else [prefix + name]
    return keys


def resolve_device(name: str) -> str:
    """The device that ``MODEL.DEVICE`` stands for: "auto" is a GPU where there is one, else cpu.

    Raises:
        ConfigError: torch does not know the device, or there is none here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"MODEL.DEVICE is {name!r}; it must be auto or a device of torch") from (
            error
        )
    available = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }.get(device.type)
    if available and not available():
        raise ConfigError(f"MODEL.DEVICE is {name!r}, but there is none here; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"MODEL.DEVICE is {name!r}, but there are {torch.cuda.device_count()} GPUs here"
        )
    return name


def check_config(cfg: CfgNode) -> None:
    """Find values that could only fail later, and far from their cause.

    Raises:
        ConfigError: names the key and what it may be.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture not in META_ARCH_REGISTRY:
        known = [name for name, _ in META_ARCH_REGISTRY]
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {architecture!r}, which is not registered"
            f"{did_you_mean(architecture, known)}"
        )
    if cfg.MODEL.BACKBONE.NAME not in BACKBONE_REGISTRY:
        known = [name for name, _ in BACKBONE_REGISTRY]
        raise ConfigError(
            f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME!r}, which is not registered"
            f"{did_you_mean(cfg.MODEL.BACKBONE.NAME, known)}"
        )
    if architecture == "LSNet":
        _check_lsnet(cfg)
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                raise ConfigError(
                    f"DATASETS.{key}: data set {name!r} is not registered"
                    f"{did_you_mean(name, DatasetCatalog.list())}"
                )
    for key, value in (
        ("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH),
        ("SOLVER.MAX_ITER", cfg.SOLVER.MAX_ITER),
    ):
        if value < 1:
            raise ConfigError(f"{key} is {value}; it must be at least 1")
    for key, value, choices in (
        ("SOLVER.LR_SCHEDULER_NAME", cfg.SOLVER.LR_SCHEDULER_NAME, SCHEDULERS),
        ("INPUT.FORMAT", cfg.INPUT.FORMAT, ("RGB", "BGR", "L", "YUV-BT.601")),
        ("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, ("none", "horizontal", "vertical")),
        ("DATASETS.INVALID_ANNOTATIONS", cfg.DATASETS.INVALID_ANNOTATIONS, ("error", "drop")),
        ("INPUT.EXTREME_POINTS", cfg.INPUT.EXTREME_POINTS, ("segmentation", "annotation")),
        ("INPUT.CONTOUR_SAMPLING", cfg.INPUT.CONTOUR_SAMPLING, ("adaptive", "reference")),
    ):
        if value not in choices:
            raise ConfigError(f"{key} is {value!r}; it must be one of {', '.join(choices)}")
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE not in CLIP_TYPES:
        raise ConfigError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; it must be one of "
            f"{', '.join(CLIP_TYPES)}"
        )
    if cfg.SOLVER.AMP.ENABLED and torch.device(cfg.MODEL.DEVICE).type != "cuda":
        raise ConfigError(
            f"SOLVER.AMP.ENABLED needs a CUDA device, but MODEL.DEVICE is {cfg.MODEL.DEVICE!r}"
        )


def _check_lsnet(cfg: CfgNode) -> None:
    try:
        build_branches(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    node = cfg.MODEL.LSNET
    if node.TOWER_CONV not in ("dcn", "conv"):
        raise ConfigError(f"MODEL.LSNET.TOWER_CONV is {node.TOWER_CONV!r}; it must be dcn or conv")
    if len(node.IN_FEATURES) < 3:
        raise ConfigError(
            f"MODEL.LSNET.IN_FEATURES is {list(node.IN_FEATURES)}; it must be three maps or more"
        )
    for key, on in (("MODEL.LSNET.CPV", node.CPV), ("TEST.AUG.ENABLED", cfg.TEST.AUG.ENABLED)):
        if on:
            raise ConfigError(f"{key} is True, which LSNet cannot do yet")


def classes_key(cfg: CfgNode) -> str:
    """The key that holds the number of classes of the config's detector."""
    nodes = {"LSNet": "LSNET", "RetinaNet": "RETINANET"}
    return f"MODEL.{nodes.get(cfg.MODEL.META_ARCHITECTURE, 'ROI_HEADS')}.NUM_CLASSES"


def num_classes(cfg: CfgNode) -> int:
    """The number of classes of the config's detector."""
    _, node, key = classes_key(cfg).split(".")
    return cfg.MODEL[node][key]
