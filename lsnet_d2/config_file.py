"""From a config file and command-line options to a checked config."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from fvcore.common.config import BASE_KEY

from .config import add_lsnet_config
from .data.annotation_checks import ON_INVALID
from .data.builtin import explain_unregistered, register_coco_files
from .data.contours import CONTOUR_METHODS
from .data.dataset_mapper import EXTREME_POINT_SOURCES
from .data.train_loader import SAMPLERS
from .description import described_config
from .errors import ConfigError, did_you_mean
from .modeling import LSNetDatasetMapperTTA, build_branches
from .modeling.test_time_augmentation import check_merging
from .solver import OPTIMIZERS
from .tasks import branch_weights
from .training_loop import PRECISIONS

logger = logging.getLogger(__name__)

# What --config-file of a tool takes.
CHECKPOINT_SUFFIX = ".pth"
CONFIG_HELP = "a YAML file, or a checkpoint (.pth), which has the config of its training"
# Keys of such a config that are not the model's but the run's.
_OF_THE_RUN = ("MODEL.DEVICE", "OUTPUT_DIR", "SEED")

# What keys with a choice may be: (key, values)
CHOICES = (
    ("DATALOADER.SAMPLER_TRAIN", SAMPLERS),
    ("DATASETS.INVALID_ANNOTATIONS", ON_INVALID),
    ("INPUT.EXTREME_POINTS", EXTREME_POINT_SOURCES),
    ("INPUT.CONTOUR_SAMPLING", CONTOUR_METHODS),
    ("INPUT.FORMAT", ("RGB", "BGR", "L", "YUV-BT.601")),
    ("TEST.BEST_MODE", ("max", "min")),
    ("INPUT.RANDOM_FLIP", ("horizontal", "vertical", "none")),
    (
        "SOLVER.LR_SCHEDULER_NAME",
        ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    ),
    ("SOLVER.AMP.PRECISION", PRECISIONS),
    ("SOLVER.OPTIMIZER", OPTIMIZERS),
)
LSNET_CHOICES = (("MODEL.LSNET.TOWER_CONV", ("dcn", "conv")),)
CLIP_CHOICES = (("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("full_model", "value", "norm")),)
_RESNET_STAGES = 5  # the stem is the first
_MIN_LEVELS = 3  # that the head samples on


def load_config(config_file: str, opts: list[str] = (), *, need_data_sets: bool = True) -> CfgNode:
    """Defaults, then the file, then ``KEY VALUE`` pairs; checked, with a device that exists.

    Where neither the file nor the options name a device, ``MODEL.DEVICE`` is "auto". The data sets
    of ``DATASETS.COCO_FILES`` are registered (:func:`lsnet_d2.data.builtin.register_coco_files`).

    Args:
        config_file: a YAML file, with ``_BASE_`` as in Detectron2; or a checkpoint (.pth) that a
            training of this project wrote: its config, with its weights for ``MODEL.WEIGHTS``, but
            without what is not the model's: device, ``OUTPUT_DIR`` and ``SEED``. Empty: defaults
            only.
        opts: keys and values in turn.
        need_data_sets: see :func:`check_config`.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a value of the wrong type, or one that
            :func:`check_config` refuses. The message names the file and the key.
        CheckpointError: the checkpoint cannot be read.
    """
    cfg = merge_config(config_file, opts)
    cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
    register_coco_files(cfg.DATASETS.COCO_FILES)
    check_config(cfg, need_data_sets=need_data_sets)
    return cfg


def merge_config(config_file: str, opts: list[str] = ()) -> CfgNode:
    """As :func:`load_config`, but not checked, with the device as it was given."""
    cfg = get_cfg()
    add_lsnet_config(cfg)
    cfg.MODEL.DEVICE = "auto"
    if config_file:
        _merge_file(cfg, config_file)
    _merge_opts(cfg, list(opts))
    return cfg


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    if not os.path.isfile(config_file):
        raise ConfigError(f"no such config file: {config_file}")
    with _naming_file(cfg, config_file):
        if config_file.endswith(CHECKPOINT_SUFFIX):
            _merge_described(cfg, config_file)
        else:
            _check_bases(config_file, ())
            # Detectron2's default runs Python expressions that a file may contain
            cfg.merge_from_file(config_file, allow_unsafe=False)


def _merge_described(cfg: CfgNode, path: str) -> None:
    text = described_config(path)
    try:
        content = CfgNode(yaml.safe_load(text))
        if BASE_KEY in content:
            raise TypeError(BASE_KEY)
        for key in _leave_out_unknown(content, cfg):
            logger.warning("%s: %s is not a key of this version; it is left out", path, key)
        kept = [word for key in _OF_THE_RUN for word in (key, _value(cfg, key))]
        cfg.merge_from_other_cfg(content)
        cfg.merge_from_list([*kept, "MODEL.WEIGHTS", path])
    except (AssertionError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: its config is damaged") from error


@contextmanager
def _naming_file(cfg: CfgNode, config_file: str) -> Iterator[None]:
    """Turn what merging a file into a config raises into a ConfigError that names both."""
    try:
        yield
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


def _check_bases(config_file: str, above: tuple[str, ...]) -> None:
    """Follow ``_BASE_`` and refuse what Detectron2 would fetch, or follow for ever."""
    with open(config_file, encoding="utf-8") as file:
        content = yaml.safe_load(file)
    if not isinstance(content, dict):
        raise ConfigError(f"{config_file}: not a config, which has keys and values")
    bases = content.get(BASE_KEY, [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or "://" in base:
            raise ConfigError(f"{config_file}: {BASE_KEY} must name a file here, not {base!r}")
        path = os.path.join(os.path.dirname(config_file), os.path.expanduser(base))
        if os.path.realpath(path) in map(os.path.realpath, (*above, config_file)):
            raise ConfigError(f"{config_file}: {BASE_KEY} {base} leads back to a file before it")
        _check_bases(path, (*above, config_file))


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


def _leave_out_unknown(content: CfgNode, cfg: CfgNode, prefix: str = "") -> list[str]:
    """Remove from one config, in place, the keys that another does not have; returns them."""
    unknown = []
    for name, value in list(content.items()):
        if name not in cfg or isinstance(value, CfgNode) != isinstance(cfg[name], CfgNode):
            del content[name]
            unknown.append(prefix + name)
        elif isinstance(value, CfgNode):
            unknown += _leave_out_unknown(value, cfg[name], f"{prefix}{name}.")
    return unknown


def _value(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


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


def check_config(cfg: CfgNode, *, need_data_sets: bool = True) -> None:
    """Find values that could only fail later, and far from their cause.

    Args:
        need_data_sets: whether the data sets of the config must be registered.

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
    if architecture == "LSNet":
        _check_lsnet(cfg)
    if cfg.TEST.AUG.ENABLED:
        _check_augmentation(cfg)
    _check_backbone(cfg)
    _check_choices(cfg, CHOICES)
    _check_evaluation(cfg)
    if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        _check_choices(cfg, CLIP_CHOICES)
    counts = ("SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD")
    for key in (*counts, classes_key(cfg)):
        if _value(cfg, key) < 1:
            raise ConfigError(f"{key} is {_value(cfg, key)}; it must be 1 or more")
    if cfg.SOLVER.REFERENCE_IMS_PER_BATCH < 0:
        raise ConfigError(
            f"SOLVER.REFERENCE_IMS_PER_BATCH is {cfg.SOLVER.REFERENCE_IMS_PER_BATCH}; it must be 1 "
            "or more, or 0 for no scaling"
        )
    for key in ("TRAIN", "TEST") if need_data_sets else ():
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                raise ConfigError(
                    f"DATASETS.{key}: data set {name!r} is not registered"
                    f"{did_you_mean(name, DatasetCatalog.list())}; {explain_unregistered(name)}"
                )


def _check_choices(cfg: CfgNode, keys: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    for key, choices in keys:
        if _value(cfg, key) not in choices:
            raise ConfigError(
                f"{key} is {_value(cfg, key)!r}; it must be one of {', '.join(choices)}"
            )


def _check_lsnet(cfg: CfgNode) -> None:
    try:
        build_branches(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_choices(cfg, LSNET_CHOICES)
    sigma = cfg.MODEL.LSNET.SOFT_NMS_SIGMA_TEST
    if not sigma >= 0:
        raise ConfigError(f"MODEL.LSNET.SOFT_NMS_SIGMA_TEST is {sigma}; it must not be negative")
    if (most := cfg.TEST.DETECTIONS_PER_IMAGE) < 1:  # to R-CNNs a negative number means all
        raise ConfigError(f"TEST.DETECTIONS_PER_IMAGE is {most}; it must be 1 or more")
    levels = cfg.MODEL.LSNET.IN_FEATURES
    if len(levels) < _MIN_LEVELS:
        raise ConfigError(
            f"MODEL.LSNET.IN_FEATURES is {list(levels)}; it must list {_MIN_LEVELS} or more maps"
        )


def _check_augmentation(cfg: CfgNode) -> None:
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture != "LSNet":
        raise ConfigError(
            f"TEST.AUG.ENABLED is True for a {architecture}; only LSNet has test-time augmentation"
        )
    if (most := cfg.TEST.AUG.DETECTIONS_PER_IMAGE) < 0:
        raise ConfigError(f"TEST.AUG.DETECTIONS_PER_IMAGE is {most}; it must not be negative")
    try:
        LSNetDatasetMapperTTA(cfg)
        check_merging(cfg.TEST.AUG.METHOD, cfg.TEST.AUG.VOTE_IOU)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_evaluation(cfg: CfgNode) -> None:
    test, average = cfg.TEST, cfg.SOLVER.EMA
    if average.ENABLED and not 0 <= average.DECAY < 1:
        raise ConfigError(f"SOLVER.EMA.DECAY is {average.DECAY}; it must be 0 or more, and below 1")
    if average.ENABLED and test.PRECISE_BN.ENABLED:
        raise ConfigError(
            "TEST.PRECISE_BN.ENABLED and SOLVER.EMA.ENABLED are True; the statistics would be "
            "those of other weights than the averaged ones"
        )
    if test.VALIDATION_LOSS and cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            "TEST.VALIDATION_LOSS and MODEL.LOAD_PROPOSALS are True; the losses are computed "
            "without files of proposals"
        )
    if test.PATIENCE < 0:
        raise ConfigError(f"TEST.PATIENCE is {test.PATIENCE}; it must be 1 or more, or 0 for never")
    if test.PATIENCE and not test.BEST_METRIC:
        raise ConfigError("TEST.PATIENCE needs a TEST.BEST_METRIC")
    if test.BEST_METRIC and test.EVAL_PERIOD < 1:
        raise ConfigError("TEST.BEST_METRIC needs a TEST.EVAL_PERIOD of 1 or more")


def _check_backbone(cfg: CfgNode) -> None:
    name, freeze_at = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT
    if name not in BACKBONE_REGISTRY:
        raise ConfigError(
            f"MODEL.BACKBONE.NAME is {name!r}, which is not registered"
            f"{did_you_mean(name, [known for known, _ in BACKBONE_REGISTRY])}"
        )
    if "resnet" in name and freeze_at > _RESNET_STAGES:  # would freeze all without a word
        raise ConfigError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; it must be 0 to {_RESNET_STAGES}"
        )


@contextmanager
def reporting_config_errors(cfg: CfgNode) -> Iterator[None]:
    """Turn what the builders of a model raise over a value of the config into a ConfigError."""
    try:
        yield
    except KeyError as error:  # a name that is none of those there
        keys = [key for key in _keys(cfg) if key.startswith("MODEL.") and _holds(cfg, key, error)]
        where = " or ".join(keys) or "a key of MODEL"
        raise ConfigError(f"{where} names {error}, which the model does not have") from error
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"cannot build the model of the config: {error}") from error


def _holds(cfg: CfgNode, key: str, error: KeyError) -> bool:
    value = _value(cfg, key)
    return error.args[0] in (value if isinstance(value, (list, tuple)) else [value])


def classes_key(cfg: CfgNode) -> str:
    """The key that holds the number of classes of the config's detector."""
    nodes = {"LSNet": "LSNET", "RetinaNet": "RETINANET", "FCOS": "FCOS"}
    return f"MODEL.{nodes.get(cfg.MODEL.META_ARCHITECTURE, 'ROI_HEADS')}.NUM_CLASSES"


def num_classes(cfg: CfgNode) -> int:
    """The number of classes of the config's detector."""
    return _value(cfg, classes_key(cfg))


def num_keypoints(cfg: CfgNode) -> int | None:
    """The number of keypoints of the config's detector; None if it has none."""
    if cfg.MODEL.META_ARCHITECTURE == "LSNet":
        return cfg.MODEL.LSNET.NUM_KEYPOINTS if "keypoint" in branch_weights(cfg) else None
    return cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else None
