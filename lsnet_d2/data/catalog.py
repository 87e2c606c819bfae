"""Reading registered data sets, with errors that name them and their files."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from ..errors import UserError
from .builtin import explain_unregistered
from .coco_json import read_coco_json

logger = logging.getLogger(__name__)


@contextmanager
def reporting_data_errors(names: list[str]) -> Iterator[None]:
    """Turn what reading a registered data set raises into a UserError that names it."""
    where = f"data set {', '.join(names)}"
    try:
        yield
    except UserError:  # our own loaders have said it
        raise
    except OSError as error:
        root = os.getenv("DETECTRON2_DATASETS", "datasets")
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise UserError(f"{where}: {reason} (DETECTRON2_DATASETS is {root})") from error
    except Exception as error:  # Detectron2's loaders do not say which file or entry it was
        for name in filter(_has_loader_of_detectron2, names):
            try:
                read_coco_json(MetadataCatalog.get(name).json_file)
            except UserError as problem:
                raise UserError(f"data set {name}: {problem}") from error
        if isinstance(error, (AssertionError, LookupError, ValueError)):
            raise UserError(f"{where}: {type(error).__name__}: {error}") from error
        raise


def _has_loader_of_detectron2(name: str) -> bool:
    """Whether a data set is a COCO file that Detectron2 loads by itself."""
    if name not in DatasetCatalog or MetadataCatalog.get(name).get("json_file") is None:
        return False
    return getattr(DatasetCatalog[name], "__module__", "").startswith("detectron2.")


def class_name(metadata: Metadata, label: int) -> str:
    """What a class of the model is called; its number where the metadata do not say."""
    names = metadata.get("thing_classes") or []
    return str(names[label]) if label < len(names) else str(label)


def load_metadata(dataset_name: str, described: Mapping[str, Any] | None = None) -> Metadata:
    """What is known of a data set's classes and keypoints, which its file may have to be read for.

    A COCO file that is registered with names of classes is read too: it has the ids of categories
    and the keypoints. Where that is not possible they stay unknown, with a warning.

    Args:
        described: what a checkpoint says (:func:`lsnet_d2.description.described_metadata`), for
            where there is no file, or one with other classes.
    """
    metadata = _read_metadata(dataset_name, described)
    classes = (described or {}).get("thing_classes")
    found = metadata.get("thing_classes")
    if classes and found and list(found) != classes:
        logger.warning(
            "Data set %s has other classes than the checkpoint, whose names are used: %s",
            dataset_name,
            ", ".join(classes),
        )
        return Metadata(**{**metadata.as_dict(), **described})
    return metadata


def _read_metadata(dataset_name: str, described: Mapping[str, Any] | None) -> Metadata:
    metadata = MetadataCatalog.get(dataset_name)
    has_names = bool(metadata.get("thing_classes"))
    has_ids = bool(metadata.get("thing_dataset_id_to_contiguous_id"))
    if has_names and has_ids:
        return metadata
    if described and described.get("thing_classes") and not _is_here(metadata):
        return Metadata(**{**metadata.as_dict(), **described})
    if has_names and not metadata.get("json_file"):
        return metadata
    try:
        if dataset_name not in DatasetCatalog:
            reason = explain_unregistered(dataset_name)
            raise UserError(f"data set {dataset_name!r} is not registered: {reason}")
        with reporting_data_errors([dataset_name]):
            DatasetCatalog.get(dataset_name)
    except UserError as error:
        logger.warning("No %s: %s", "ids of categories" if has_names else "names of classes", error)
    return metadata


def _is_here(metadata: Metadata) -> bool:
    return os.path.isfile(metadata.get("json_file") or "")
