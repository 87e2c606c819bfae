"""What a checkpoint says about its model: the config, and what classes and keypoints are called."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .errors import CheckpointError, ConfigError
from .weight_files import map_torch_file

logger = logging.getLogger(__name__)

KEY = "lsnet_d2"  # in a checkpoint

# What reading something of an unusual form raises.
_UNUSUAL = (ArithmeticError, AttributeError, TypeError, ValueError)


def _texts(names: Any) -> list[str]:
    if isinstance(names, str):
        raise TypeError("a text where a list of texts should be")
    return [str(name) for name in names]


# Fields of Detectron2's metadata, and what makes plain data of them: other things than these could
# not be read back with weights_only.
_FIELDS: dict[str, Callable[[Any], Any]] = {
    "thing_classes": _texts,
    "thing_dataset_id_to_contiguous_id": lambda ids: {
        k if isinstance(k, str) else int(k): int(v) for k, v in ids.items()
    },
    "keypoint_names": _texts,
    "keypoint_flip_map": lambda pairs: [(str(a), str(b)) for a, b in pairs],
    "keypoint_connection_rules": lambda bones: [
        (str(a), str(b), tuple(int(value) for value in color)) for a, b, color in bones
    ],
    "keypoint_oks_sigmas": lambda sigmas: [float(sigma) for sigma in sigmas],
}


def describe_model(cfg: CfgNode) -> dict[str, Any]:
    """What is saved with the weights of a training.

    Returns:
        "config": YAML with all keys; "metadata": fields of Detectron2's metadata, each from the
        first of ``DATASETS.TRAIN`` that has it. The data sets must have been read. What is not of
        the usual form is left out, with a warning.
    """
    metadata: dict[str, Any] = {}
    for name in reversed(cfg.DATASETS.TRAIN):
        known = MetadataCatalog.get(name).as_dict()
        for key, plain in _FIELDS.items():
            try:
                if key in known and known[key] is not None and len(known[key]):
                    metadata[key] = plain(known[key])
            except _UNUSUAL:
                logger.warning("Checkpoints will not have the %s of data set %s", key, name)
    return {"config": cfg.dump(), "metadata": metadata}


def described_metadata(checkpoint: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The metadata of :func:`describe_model`, out of what a file holds; empty where it has none.

    Args:
        path: of the file, for messages.

    Raises:
        CheckpointError: they are not what :func:`describe_model` writes.
    """
    try:
        found = dict(checkpoint.get(KEY, {}).get("metadata", {}).items())
        metadata = {key: plain(found[key]) for key, plain in _FIELDS.items() if key in found}
        for key in ("keypoint_flip_map", "keypoint_connection_rules"):
            ends = {end for ends in metadata.get(key, ()) for end in ends[:2]}
            if not ends <= set(metadata.get("keypoint_names", ())):
                raise ValueError(f"{key} names other keypoints")
    except _UNUSUAL as error:
        raise CheckpointError(f"{path}: its description is damaged") from error
    return metadata


def described_config(path: str) -> str:
    """The config that a checkpoint was trained with, as YAML.

    Raises:
        CheckpointError: the file is damaged, or holds more than plain data.
        ConfigError: it has none, as it was not written by a training of this project.
    """
    description = map_torch_file(path).get(KEY)
    config = description.get("config") if isinstance(description, Mapping) else None
    if not isinstance(config, str):
        raise ConfigError(
            f"{path} holds weights without a config: give the config as a file, and this as "
            "MODEL.WEIGHTS"
        )
    return config
