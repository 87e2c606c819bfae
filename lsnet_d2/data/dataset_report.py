"""Everything that is wrong with a COCO file, and its content with what can be repaired.

The loader and the checks before a training stop at the first kind of problem; here all are listed.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from detectron2.structures import BoxMode
from tqdm import tqdm

from .annotation_checks import box_problems, name_annotation
from .coco_json import entries_lacking_keys, ids_of_two_kinds, is_id, unknown_category
from .images import ImageError, read_image, read_image_size
from .keypoints import is_finite, skeleton_metadata
from .repairs import (
    LEFT_OUT,
    repair_area,
    repair_box,
    repair_extreme_points,
    repair_keypoints,
    repair_segmentation,
)

_FILE = "file"  # where problems of the lists are


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        where: the entry, with its id, and for annotations the image.
        text: what is wrong with it.
        repair: what the repaired content has in its place; empty: the problem itself, as there
            is no answer that is right for sure.
    """

    where: str
    text: str
    repair: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" + (f" [{self.repair}]" if self.repair else "")


@dataclass(frozen=True)
class DatasetReport:
    """
    Attributes:
        problems: in the order of the file: categories, images, annotations.
        repaired: a content without the problems that have a repair. Parts without problems are
            shared with the input, which is left as it is.
    """

    problems: list[Problem]
    repaired: dict[str, Any]

    @property
    def remaining(self) -> list[Problem]:
        """The problems that ``repaired`` still has."""
        return [problem for problem in self.problems if not problem.repair]

    @property
    def has_usable_lists(self) -> bool:
        """Whether ``repaired`` has images, and categories with names and one skeleton."""
        return not any(problem.where == _FILE for problem in self.remaining)


def report_dataset(
    data: dict[str, Any], image_root: str | os.PathLike, *, decode_images: bool = True
) -> DatasetReport:
    """Check every entry of a COCO file.

    Repaired is only what loses nothing that training could use: unusable boxes are taken from the
    segmentation, or else the object is left out; unusable parts of segmentations, keypoints and
    extreme points are left out, and the object stays with its box; images that cannot be read are
    left out with their objects; repeated ids of annotations become new ones. A wrong size of an
    image, for one, is not: nobody but its owner knows which size the annotations are for.

    Args:
        data: of :func:`lsnet_d2.data.coco_json.read_coco_lists`.
        image_root: the folder that ``file_name`` starts from.
        decode_images: decode every image, which finds truncated ones too. Without it only their
            heads are read.
    """
    checker = _Checker(os.fspath(image_root), decode_images)
    categories = checker.check_categories(data["categories"])
    images = checker.check_images(data["images"], data["annotations"])
    annotations = checker.check_annotations(data["annotations"])
    repaired = {**data, "categories": categories, "images": images, "annotations": annotations}
    return DatasetReport(problems=checker.problems, repaired=repaired)


def _filled(entries: list, **defaults: object) -> list:
    """Entries that have these keys, for checks that say more than that a key is missing."""
    return [{**defaults, **entry} if isinstance(entry, dict) else entry for entry in entries]


def _new_ids(taken: list) -> Iterator[Any]:
    """Further ids, text where all that are taken are text."""
    text = bool(taken) and all(isinstance(identity, str) for identity in taken)
    first = max((int(identity) for identity in taken if is_finite(identity)), default=0) + 1
    numbers = itertools.count(first)
    return itertools.filterfalse(set(taken).__contains__, map(str, numbers)) if text else numbers


def _name_image(image: dict) -> str:
    return f"image {image['id']} ({image['file_name']})"


def _name_category(category: dict) -> str:
    return f"category {category['id']} ({category['name']})"


@dataclass
class _Checker:
    """Collects problems. Its methods take a list of the file and return the repaired one; they
    are called in the order of :func:`report_dataset`."""

    image_root: str
    decode_images: bool
    problems: list[Problem] = field(default_factory=list)
    categories: dict[Any, dict] = field(default_factory=dict)  # by id
    images: dict[Any, dict] = field(default_factory=dict)  # by id, those that stay
    lost_images: set = field(default_factory=set)  # ids of those that are left out

    def _report(self, where: str, text: str, repair: str = "") -> None:
        self.problems.append(Problem(where, text, repair))

    def _complete(self, key: str, entries: list, repair: str, *, with_id: bool = True) -> list:
        """Entries that have all keys, and an id that can be one."""
        lacking = entries_lacking_keys(key, entries)
        for index, entry in enumerate(entries):
            if with_id and index not in lacking and not is_id(entry["id"]):
                lacking[index] = f"entry number {index} of {key!r} has the id {entry['id']!r}"
        for _, text in sorted(lacking.items()):
            self._report(_FILE, text, repair)
        complete = [entry for index, entry in enumerate(entries) if index not in lacking]
        if with_id:
            self._check_kind(key, complete)
        return complete

    def _check_kind(self, key: str, entries: list[dict]) -> None:
        for text in ids_of_two_kinds(key, entries):
            self._report(_FILE, text)

    def _without_copies(self, entries: list[dict], name: Callable[[dict], str]) -> list[dict]:
        first, kept = {}, []
        for entry in entries:
            known = first.setdefault(entry["id"], entry)
            if known is not entry and known == entry:
                self._report(name(entry), "occurs twice", "once")
                continue
            if known is not entry:
                self._report(name(entry), f"has the id of {name(known)}")
            kept.append(entry)
        return kept

    def check_categories(self, entries: list) -> list:
        complete = self._complete("categories", entries, "")
        kept = self._without_copies(complete, _name_category)
        self.categories = {category["id"]: category for category in reversed(kept)}
        for name, count in Counter(str(c["name"]) for c in self.categories.values()).items():
            if count > 1:
                self._report(_FILE, f"{count} categories have the name {name!r}")
        if not entries:
            self._report(_FILE, "there are no categories")
        try:
            skeleton_metadata(kept)
        except ValueError as error:
            self._report(_FILE, str(error))
        return kept if len(complete) == len(entries) else entries

    def check_images(self, entries: list, annotations: list) -> list[dict]:
        entries = self._complete("images", _filled(entries, width=None, height=None), LEFT_OUT)
        entries = self._without_copies(entries, _name_image)
        objects = Counter(
            a["image_id"] for a in annotations if isinstance(a, dict) and is_id(a.get("image_id"))
        )
        kept = []
        for image in tqdm(entries, disable=None, desc="images"):
            try:
                height, width = self._read_size(image)
            except ImageError as error:
                repair = f"{LEFT_OUT}, with its {objects[image['id']]} annotations"
                self._report(_name_image(image), str(error), repair)
                self.lost_images.add(image["id"])
                continue
            stated = image["width"], image["height"]
            if not all(is_finite(number) and number >= 1 for number in stated):
                text = f"its width and height are {stated[0]!r} and {stated[1]!r}"
                self._report(_name_image(image), text, f"{width} and {height}")
                image = {**image, "width": width, "height": height}
            elif stated != (width, height):
                hint = (
                    "turned as its EXIF data say"
                    if stated == (height, width)
                    else "the annotations may be of another version of it"
                )
                self._report(
                    _name_image(image),
                    f"it is said to have {stated[0]} x {stated[1]} pixels, but has {width} x "
                    f"{height} ({hint})",
                )
            kept.append(image)
            self.images.setdefault(image["id"], image)
        if not kept:
            self._report(_FILE, "there is no image that can be read")
        return kept

    def _read_size(self, image: dict) -> tuple[int, int]:
        path = os.path.join(self.image_root, str(image["file_name"]))
        return read_image(path, "L").shape[:2] if self.decode_images else read_image_size(path)

    def check_annotations(self, entries: list) -> list[dict]:
        entries = _filled(entries, id=None, bbox=None)
        entries = self._complete("annotations", entries, LEFT_OUT, with_id=False)
        listed = self.images.keys() | self.lost_images
        found = []
        for annotation in entries:
            image = annotation["image_id"]
            if not is_id(image) or image not in listed:
                text = f"image {image} is not in the list of images"
                self._report(f"annotation {annotation['id']}", text, LEFT_OUT)
            elif image in self.images:
                found.append(annotation)
        found = self._with_own_ids(found)
        records = {identity: index for index, identity in enumerate(self.images)}
        boxes = box_problems(
            list(self.images.values()),
            [(records[a["image_id"]], 0) for a in found],
            [{**a, "bbox_mode": BoxMode.XYWH_ABS} for a in found],
        )
        checked = [self._check_annotation(a, boxes.get(i, "")) for i, a in enumerate(found)]
        kept = [annotation for annotation in checked if annotation is not None]
        self._check_named(kept)
        return kept

    def _name(self, annotation: dict) -> str:
        record = {**self.images[annotation["image_id"]], "annotations": [annotation]}
        return name_annotation(record, 0)

    def _with_own_ids(self, annotations: list[dict]) -> list[dict]:
        new_ids = _new_ids([a["id"] for a in annotations if is_id(a["id"])])
        first, kept = {}, []
        for annotation in annotations:
            identity = annotation["id"]
            known = first.setdefault(identity, annotation) if is_id(identity) else None
            if known is annotation:
                kept.append(annotation)
            elif known == annotation:
                self._report(self._name(annotation), "occurs twice", "once")
            else:
                text = f"its id is {identity!r}"
                if known:
                    same = known["image_id"] == annotation["image_id"]
                    text = f"has the id of {'another one' if same else self._name(known)}"
                new = {**annotation, "id": next(new_ids)}
                self._report(self._name(annotation), text, f"id {new['id']}")
                kept.append(new)
        self._check_kind("annotations", kept)
        return kept

    def _check_annotation(self, annotation: dict, box_problem: str) -> dict | None:
        """The annotation as it can be used, or None."""
        name, image = self._name(annotation), self.images[annotation["image_id"]]
        result, category, found = dict(annotation), {}, []
        if is_id(annotation["category_id"]) and annotation["category_id"] in self.categories:
            category = self.categories[annotation["category_id"]]
        else:
            found.append((unknown_category(annotation), ""))
        found += repair_segmentation(result, image)
        names = category.get("keypoints")
        found += repair_keypoints(result, len(names) if isinstance(names, list) else 0)
        found += repair_extreme_points(result)
        found += repair_area(result)
        usable = True
        if box_problem:
            repair = repair_box(result, image)
            found.append((box_problem, repair))
            usable = bool(repair)
        for text, repair in found:
            self._report(name, text, repair if usable else LEFT_OUT)
        return result if usable else None

    def _check_named(self, annotations: list[dict]) -> None:
        """Keypoints of a class without names would be left out of training without a word.

        All-zero ones do not count: where some classes have keypoints, pycocotools wants the key in
        every annotation.
        """
        counts = Counter(
            a["category_id"]
            for a in annotations
            if any((a.get("keypoints") or [])[2::3]) and is_id(a["category_id"])
        )
        for identity, category in self.categories.items():
            if counts[identity] and not category.get("keypoints"):
                self._report(
                    _name_category(category),
                    f"{counts[identity]} of its annotations have keypoints, but it has no list "
                    "'keypoints' of their names",
                )
