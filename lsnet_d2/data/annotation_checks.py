"""Finding annotations that would spoil a training, before it starts."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from .extreme_points import as_extreme_points
from .keypoints import MAX_COORDINATE, as_keypoints
from .polygons import check_form

logger = logging.getLogger(__name__)

MAX_LISTED = 5  # problems that a message lists
ON_INVALID = ("error", "drop")  # what may be done about invalid boxes


class AnnotationError(UserError, ValueError):
    """Annotations are malformed, or do not fit the images or the config."""


def check_dataset_dicts(
    dataset_dicts: list[dict],
    *,
    num_classes: int,
    dataset_name: str | Sequence[str],
    num_classes_key: str = "MODEL.LSNET.NUM_CLASSES",
    on_invalid: str = "error",
    need_extreme_points: bool = False,
    num_keypoints: int | None = None,
) -> list[dict]:
    """Check images and annotations without opening an image: 100,000 images take seconds.

    Errors are: a number of classes other than the config's; a missing image file; a class out of
    range; a box that is not four finite numbers, is larger than any image, has no width or height,
    or lies outside its image (boxes that reach over the border are common, and are clipped later);
    malformed extreme points; a segmentation of no known form, or an RLE of another size than its
    image; keypoints that are not finite, or not as many as the model has.

    Args:
        dataset_dicts: in Detectron2's format; nothing is written into them.
        num_classes: of the config.
        dataset_name: name or names of the data sets that the dicts come from.
        num_classes_key: the config's key of ``num_classes``, for the message.
        on_invalid: what to do about annotations with an invalid box: "error", or "drop" them and
            log the first few and their number. The COCO 2017 training set has a few without a
            height.
        need_extreme_points: objects with a segmentation must have the key "extreme_points" too.
        num_keypoints: of the model; None: it has none, and those of annotations are not looked at.

    Returns:
        The input, or with "drop" a list in which images with invalid boxes are replaced by copies
        without these annotations.

    Raises:
        AnnotationError: says what is wrong, names the first few places and counts all.
        ValueError: ``on_invalid`` is neither of the two.
    """
    if on_invalid not in ON_INVALID:
        raise ValueError(f"on_invalid must be 'error' or 'drop', not {on_invalid!r}")
    names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
    check_class_count(names, num_classes, num_classes_key)
    where = name_datasets(names)
    raise_problems(where, missing_images(dataset_dicts))

    places = [
        (image, index)
        for image, record in enumerate(dataset_dicts)
        for index in range(len(record.get("annotations", ())))
    ]
    annotations = [a for record in dataset_dicts for a in record.get("annotations", ())]
    invalid_boxes = box_problems(dataset_dicts, places, annotations)
    if invalid_boxes and on_invalid == "drop":
        logger.warning(
            "%s: %d annotations with invalid boxes dropped:\n%s",
            where,
            len(invalid_boxes),
            "\n".join(
                _first_few(_describe(names, dataset_dicts, places, annotations, invalid_boxes))
            ),
        )
        dataset_dicts = _without(dataset_dicts, [places[i] for i in invalid_boxes])
        return check_dataset_dicts(
            dataset_dicts,
            num_classes=num_classes,
            dataset_name=dataset_name,
            num_classes_key=num_classes_key,
            need_extreme_points=need_extreme_points,
            num_keypoints=num_keypoints,
        )
    problems = dict(invalid_boxes)
    for index, annotation in enumerate(annotations):
        record = dataset_dicts[places[index][0]]
        text = _annotation_problem(
            annotation, record, num_classes, need_extreme_points, num_keypoints
        )
        if text:
            problems.setdefault(index, text)
    if problems:
        raise_problems(
            where,
            _describe(names, dataset_dicts, places, annotations, problems),
            hint="Correct the boxes, or set DATASETS.INVALID_ANNOTATIONS to 'drop'."
            if invalid_boxes
            else "",
        )
    _log_box_only(where, annotations)
    return dataset_dicts


def name_annotation(record: dict, index: int, ids: dict | None = None) -> str:
    """The ``index``-th annotation of a dataset dict as messages name it.

    Args:
        ids: annotation ids by (image id, bbox), for annotations that have lost theirs.
    """
    annotation = record["annotations"][index]
    identity = annotation.get("id")
    if identity is None and ids:
        identity = ids.get((record.get("image_id"), _box_key(annotation.get("bbox"))))
    which = f"annotation number {index}" if identity is None else f"annotation {identity}"
    return f"{which} of image {record.get('file_name')}"


def read_boxes(rows: Sequence) -> tuple[np.ndarray, dict[int, str]]:
    """Boxes of annotations as they stand in files.

    Args:
        rows: N of them, of any kind.

    Returns:
        (N, 4) float64, and by index what is wrong with those that are not four finite numbers,
        which are NaN in the array.
    """
    boxes = _numbers(rows, (len(rows), 4)) if rows else np.empty((0, 4))
    if boxes is None:
        alone = [_numbers(row, (4,)) for row in rows]
        boxes = np.array([np.full(4, np.nan) if box is None else box for box in alone])
    boxes[~np.isfinite(boxes).all(axis=1)] = np.nan
    problems = {
        index: f"its box {_plain(rows[index])} is not four finite numbers"
        for index in np.flatnonzero(np.isnan(boxes[:, 0])).tolist()
    }
    return boxes, problems


def raise_problems(where: str, problems: Sequence[str], hint: str = "") -> None:
    """
    Raises:
        AnnotationError: there are problems; the message has the first few and their number.
    """
    if not problems:
        return
    listed = _first_few(problems)
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise AnnotationError("\n".join([f"{where}: {count}:", *listed, *([hint] if hint else [])]))


def _first_few(problems: Sequence[str]) -> list[str]:
    """Lines of a message."""
    listed = [f"  {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        listed.append(f"  ... and {len(problems) - MAX_LISTED} more")
    return listed


def _describe(
    names: Sequence[str],
    dataset_dicts: Sequence[dict],
    places: Sequence[tuple[int, int]],
    annotations: Sequence[dict],
    problems: dict[int, str],
) -> list[str]:
    """Each annotation, and its problem by position in ``annotations``, for a message."""
    ids = _ids_in_files(names) if any("id" not in annotations[i] for i in problems) else {}
    return [
        f"{name_annotation(dataset_dicts[places[i][0]], places[i][1], ids)}: {problems[i]}"
        for i in sorted(problems)
    ]


def name_datasets(names: Sequence[str]) -> str:
    """Data sets with their annotation files, as messages name them."""
    files = [_json_file(name) for name in names]
    return "data set " + ", ".join(
        f"{name} ({file})" if file else name for name, file in zip(names, files, strict=True)
    )


def _json_file(name: str) -> str | None:
    # asking for an unknown name would make an entry
    return MetadataCatalog.get(name).get("json_file") if name in MetadataCatalog.list() else None


def check_class_count(names: Sequence[str], num_classes: int, key: str) -> None:
    """Compare a model's classes with those of data sets, where these are known.

    Args:
        key: of the config, which has the model's number.

    Raises:
        AnnotationError: they differ in number.
    """
    for name in names:
        classes = (
            MetadataCatalog.get(name).get("thing_classes")
            if name in MetadataCatalog.list()
            else None
        )
        if classes is not None and len(classes) != num_classes:
            shown = ", ".join(classes[:MAX_LISTED]) + (", ..." if len(classes) > MAX_LISTED else "")
            raise AnnotationError(
                f"{name_datasets([name])} has {len(classes)} classes ({shown}), but {key} is "
                f"{num_classes}: set it to {len(classes)}"
            )


def missing_images(dataset_dicts: Iterable[dict]) -> list[str]:
    """What is missing of the image files of dataset dicts, a line each.

    One listing a folder is faster than asking for each file, above all over a network.
    """
    by_folder = defaultdict(list)
    for record in dataset_dicts:
        if "://" not in record["file_name"]:
            by_folder[os.path.dirname(record["file_name"])].append(record["file_name"])
    missing = []
    for folder, files in by_folder.items():
        try:
            present = set(os.listdir(folder or "."))
        except OSError:
            missing.append(f"no folder of images {folder}")
            continue
        # names may differ in case where the file system does not care
        missing += [
            f"no image file {file}"
            for file in files
            if os.path.basename(file) not in present and not os.path.exists(file)
        ]
    return missing


def box_problems(
    dataset_dicts: Sequence[dict], places: Sequence[tuple[int, int]], annotations: Sequence[dict]
) -> dict[int, str]:
    """What is wrong with the boxes of annotations, by position in ``annotations``.

    Args:
        dataset_dicts: the images; one without "width" and "height" has no border.
        places: of each annotation the position of its image, and its own position there.
        annotations: with "bbox" and "bbox_mode".
    """
    rows = [a.get("bbox") for a in annotations]
    boxes, malformed = read_boxes(rows)
    modes = np.array([int(a.get("bbox_mode", -1)) for a in annotations], dtype=int)
    boxes[modes == BoxMode.XYWH_ABS, 2:] += boxes[modes == BoxMode.XYWH_ABS, :2]
    sizes = np.array(
        [[r.get("width", np.inf), r.get("height", np.inf)] for r in dataset_dicts], dtype=float
    ).reshape(-1, 2)
    sizes = sizes[[image for image, _ in places]]

    x0, y0, x1, y1 = boxes.T
    tests = (
        (np.abs(boxes).max(axis=1, initial=0) > MAX_COORDINATE, "is beyond all images"),
        (~((x1 > x0) & (y1 > y0)), "has no width or no height"),
        (
            (x0 >= sizes[:, 0]) | (y0 >= sizes[:, 1]) | (x1 <= 0) | (y1 <= 0),
            "lies outside its image",
        ),
    )
    known = np.isin(modes, (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    found = malformed | {
        index: f"its box {_plain(rows[index])} is neither XYWH_ABS nor XYXY_ABS"
        for index in np.flatnonzero(~known).tolist()
    }
    for failed, text in tests:
        for index in np.flatnonzero(failed).tolist():
            shown = f"its box {_plain(rows[index])} {text}"
            if text.endswith("image"):
                width, height = sizes[index]
                shown += f" of {width:g} x {height:g} pixels"
            found.setdefault(index, shown)
    return found


def _numbers(value: object, shape: tuple[int, ...]) -> np.ndarray | None:
    """``value`` as a new array of this shape, unless it is something else than numbers."""
    try:
        array = np.array(value)
    except ValueError:  # not all rows are alike
        return None
    if array.dtype.kind not in "iuf" or array.shape != shape:
        return None
    return array.astype(np.float64)


def _annotation_problem(
    annotation: dict,
    record: dict,
    num_classes: int,
    need_extreme_points: bool,
    num_keypoints: int | None,
) -> str:
    category = annotation.get("category_id")
    if not isinstance(category, (int, np.integer)) or not 0 <= category < num_classes:
        return f"its class {category} is not one of 0 to {num_classes - 1}"
    size = (record["height"], record["width"]) if {"height", "width"} <= record.keys() else None
    try:
        check_form(annotation.get("segmentation"), size)
    except ValueError as error:
        return str(error)
    if num_keypoints is not None:
        try:
            as_keypoints(annotation.get("keypoints"), num_keypoints)
        except ValueError as error:
            return str(error)
    if "extreme_points" in annotation:
        try:
            as_extreme_points(annotation["extreme_points"])
        except ValueError as error:
            return str(error)
    elif need_extreme_points and annotation.get("segmentation") and not is_region(annotation):
        return (
            "it has no extreme_points. tools/gen_coco_lsvr.py writes them; Detectron2's own "
            "loader, which coco_2017_train has, drops them: take coco_train2017, as the folder is "
            "known too"
        )
    return ""


def is_region(annotation: dict) -> bool:
    """Whether it is a crowd, or to be ignored: no object, and no background."""
    return bool(annotation.get("iscrowd") or annotation.get("ignore"))


def _without(dataset_dicts: list[dict], places: Iterable[tuple[int, int]]) -> list[dict]:
    dropped = defaultdict(set)
    for image, index in places:
        dropped[image].add(index)
    result = list(dataset_dicts)
    for image, indices in dropped.items():
        kept = [a for i, a in enumerate(result[image]["annotations"]) if i not in indices]
        result[image] = {**result[image], "annotations": kept}
    return result


def _log_box_only(where: str, annotations: Iterable[dict]) -> None:
    objects = [a for a in annotations if not is_region(a)]
    count = sum(not a.get("segmentation") and "extreme_points" not in a for a in objects)
    if count:
        logger.info(
            "%s: %d of %d objects have neither segmentation nor extreme points; the middles of "
            "their boxes' sides are used",
            where,
            count,
            len(objects),
        )


def _ids_in_files(names: Sequence[str]) -> dict:
    """Annotation ids by image id and box: Detectron2's loader does not keep them."""
    ids = {}
    for file in filter(None, map(_json_file, names)):
        with PathManager.open(file, encoding="utf-8") as stream:
            for annotation in json.load(stream).get("annotations", []):
                key = annotation.get("image_id"), _box_key(annotation.get("bbox"))
                ids[key] = annotation.get("id")
    return ids


def _box_key(box: Sequence[float] | None) -> str:
    return str(_plain(box))


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else value
