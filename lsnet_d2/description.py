"""What a checkpoint says about its model: the config, and what classes and keypoints are called."""

from collections.abc import Callable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .errors import CheckpointError, ConfigError
from .weight_files import read_torch_file

KEY = "lsnet_d2"  # in a checkpoint

# Fields of Detectron2's metadata, and what makes plain data of them: other things than these could
# not be read back with weights_only.
_FIELDS: dict[str, Callable[[Any], Any]] = {
    "thing_classes": lambda names: [str(name) for name in names],
    "thing_dataset_id_to_contiguous_id": lambda ids: {int(k): int(v) for k, v in ids.items()},
    "keypoint_names": lambda names: [str(name) for name in names],
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
        first of ``DATASETS.TRAIN`` that has it. The data sets must have been read.
    """
    metadata: dict[str, Any] = {}
    for name in reversed(cfg.DATASETS.TRAIN):
        known = MetadataCatalog.get(name).as_dict()
        metadata |= {key: plain(known[key]) for key, plain in _FIELDS.items() if known.get(key)}
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
        return {key: plain(found[key]) for key, plain in _FIELDS.items() if key in found}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its description is damaged") from error


def described_config(path: str) -> str:
    """The config that a checkpoint was trained with, as YAML.

    Raises:
        CheckpointError: see :func:`lsnet_d2.weight_files.read_torch_file`.
        ConfigError: it has none, as it was not written by a training of this project.
    """
    description = read_torch_file(path).get(KEY)
    config = description.get("config") if isinstance(description, Mapping) else None
    if not isinstance(config, str):
        raise ConfigError(
            f"{path} holds weights without a config: give the config as a file, and this as "
            "MODEL.WEIGHTS"
        )
    return config
