"""The data of a run: data sets are loaded and checked, and loaders built of them."""

import logging
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.utils import comm
from torch.utils.data import DataLoader

from .config_file import classes_key, num_classes, num_keypoints
from .data.annotation_checks import AnnotationError, check_dataset_dicts, name_datasets
from .data.catalog import reporting_data_errors
from .data.dataset_mapper import LSNetDatasetMapper
from .data.train_loader import TrainingLoader, sampler_maker
from .errors import ConfigError, UserError
from .seeding import with_seed
from .tasks import branch_weights
from .validation_loss import ValidationLoader, validation_mapper
from .weight_files import require_plain_pickle

logger = logging.getLogger(__name__)


def load_training_data(cfg: CfgNode) -> list[dict]:
    """The dataset dicts of ``DATASETS.TRAIN``, filtered as Detectron2 does it, and checked.

    Raises:
        UserError: a file is missing or broken, or no object is left to learn.
        AnnotationError: see :func:`lsnet_d2.data.annotation_checks.check_dataset_dicts`.
    """
    names = list(cfg.DATASETS.TRAIN)
    if not names:
        raise ConfigError("DATASETS.TRAIN is empty")
    check_proposals(cfg)
    with reporting_data_errors(names):
        dicts = get_detection_dataset_dicts(
            names,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
            if cfg.MODEL.KEYPOINT_ON
            else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    checked = _check_objects(cfg, dicts, names)
    if checked is dicts:
        return dicts
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        checked = filter_images_with_only_crowd_annotations(checked)
    if not any(record["annotations"] for record in checked):
        raise UserError(
            f"data set {', '.join(names)}: no annotation is left without those that were dropped "
            "(DATASETS.INVALID_ANNOTATIONS is 'drop')"
        )
    return checked


def load_validation_data(cfg: CfgNode, name: str) -> list[dict]:
    """The dataset dicts of a data set whose losses are computed, checked like those to learn from.

    Raises:
        UserError, AnnotationError: see :func:`load_training_data`.
    """
    with reporting_data_errors([name]):
        dicts = get_detection_dataset_dicts([name], filter_empty=False)
    return _check_objects(cfg, dicts, name)


def check_test_data(cfg: CfgNode, name: str) -> None:
    """Find what would stop the evaluation on a data set, before hours of training.

    Raises:
        UserError: a file of annotations is missing or broken.
        AnnotationError: the number of classes is not the config's, image files are missing, or
            classes have other numbers than in the data to train on.
    """
    with reporting_data_errors([name]):
        dicts = get_detection_dataset_dicts([name], filter_empty=False)
    check_dataset_dicts(
        [{"file_name": record["file_name"]} for record in dicts],
        num_classes=num_classes(cfg),
        dataset_name=name,
        num_classes_key=classes_key(cfg),
    )
    _check_same_classes(cfg.DATASETS.TRAIN[0], name)


def _check_same_classes(train: str, test: str) -> None:
    """
    Raises:
        AnnotationError: a class has another number in the one than in the other. Other names alone
            are logged.
    """
    learned, tested = (MetadataCatalog.get(name).get("thing_classes") for name in (train, test))
    if learned is None or tested is None or list(learned) == list(tested):
        return
    for number, name in enumerate(tested):
        if name in learned and learned[number] != name:
            raise AnnotationError(
                f"class {number} is {name!r} in {name_datasets([test])}, but {learned[number]!r} "
                f"in {name_datasets([train])}"
            )
    logger.warning(
        "The classes of %s have other names than those of %s; they are compared by their numbers",
        name_datasets([test]),
        name_datasets([train]),
    )


def _check_objects(cfg: CfgNode, dicts: list[dict], names: str | Sequence[str]) -> list[dict]:
    """Images and annotations that losses are computed of."""
    return check_dataset_dicts(
        dicts,
        num_classes=num_classes(cfg),
        dataset_name=names,
        num_classes_key=classes_key(cfg),
        on_invalid=cfg.DATASETS.INVALID_ANNOTATIONS,
        need_extreme_points=_reads_extreme_points(cfg),
        num_keypoints=num_keypoints(cfg),
    )


def _reads_extreme_points(cfg: CfgNode) -> bool:
    """Whether objects with a mask must have extreme points in their annotations."""
    return (
        cfg.INPUT.EXTREME_POINTS == "annotation"
        and cfg.MODEL.META_ARCHITECTURE == "LSNet"
        and "extreme" in branch_weights(cfg)
    )


def check_proposals(cfg: CfgNode) -> None:
    """
    Raises:
        CheckpointError: a file of proposals, which Detectron2 unpickles, holds more than data.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        for file in (*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST):
            require_plain_pickle(file)


def build_mapper(cfg: CfgNode, is_train: bool) -> Callable[[dict], dict | None]:
    """The dataset mapper that the meta-architecture of the config needs.

    Raises:
        ConfigError: the model has keypoints, and a data set to train on has none.
    """
    if cfg.MODEL.KEYPOINT_ON and is_train:
        for name in cfg.DATASETS.TRAIN:
            if not MetadataCatalog.get(name).get("keypoint_names"):
                raise ConfigError(
                    f"MODEL.KEYPOINT_ON is True, but the metadata of {name} have no keypoint_names"
                )
    elif cfg.MODEL.KEYPOINT_ON:
        # Detectron2's mapper asks for the keypoints of DATASETS.TRAIN, which need not be here.
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.KEYPOINT_ON = False
    mapper = LSNetDatasetMapper if cfg.MODEL.META_ARCHITECTURE == "LSNet" else DatasetMapper
    return mapper(cfg, is_train)


def build_train_loader(cfg: CfgNode) -> TrainingLoader:
    """The batches of ``DATASETS.TRAIN`` for this process, or the parts of them.

    Raises:
        UserError: see :func:`load_training_data`, :func:`build_mapper` and
            :func:`lsnet_d2.data.train_loader.sampler_maker`.
    """
    # Loading a data set enters its keypoints into the metadata, which the mapper reads.
    dataset = load_training_data(cfg)
    return TrainingLoader(
        dataset,
        build_mapper(cfg, is_train=True),
        sampler_maker(cfg, dataset),
        batch_size=_batch_size(cfg),
        seed=with_seed(cfg).SEED,
        group_by_orientation=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_validation_loaders(cfg: CfgNode) -> dict[str, ValidationLoader]:
    """The images of each data set in ``DATASETS.TEST``, mapped as for a training but not augmented.

    Raises:
        UserError: see :func:`load_validation_data`.
    """
    mapper = validation_mapper(type(build_mapper(cfg, is_train=True)), cfg)
    return {
        name: ValidationLoader(
            load_validation_data(cfg, name),
            mapper,
            batch_size=_batch_size(cfg),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        for name in cfg.DATASETS.TEST
    }


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Detectron2's, of one data set.

    Raises:
        UserError: a file of annotations is missing or broken.
    """
    with reporting_data_errors([dataset_name]):
        return build_detection_test_loader(
            cfg, dataset_name, mapper=build_mapper(cfg, is_train=False)
        )


def check_batch(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: a batch cannot be divided among the processes and the parts of a step.
    """
    steps, processes = cfg.SOLVER.ACCUMULATION_STEPS, comm.get_world_size()
    if steps < 1:
        raise ConfigError(f"SOLVER.ACCUMULATION_STEPS is {steps}; it must be positive")
    if cfg.SOLVER.IMS_PER_BATCH % (steps * processes):
        parts = f"the number of processes, {processes}"
        if steps > 1:
            parts += f", times SOLVER.ACCUMULATION_STEPS, {steps}"
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a multiple of {parts}"
        )


def _batch_size(cfg: CfgNode) -> int:
    """Images that one process has at once."""
    return cfg.SOLVER.IMS_PER_BATCH // (cfg.SOLVER.ACCUMULATION_STEPS * comm.get_world_size())
