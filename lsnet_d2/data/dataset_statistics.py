"""How many objects of which class and size a COCO file has, as text and as a picture."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from .annotation_checks import is_region
from .coco_json import is_id
from .keypoints import skeleton_metadata

# COCO's small objects have a smaller area than the first, its large ones a larger than the second.
SIZE_LIMITS = (32**2, 96**2)  # square pixels
_QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True, kw_only=True)
class ClassStatistics:
    """
    Attributes:
        name: of the category.
        images: with an object of the class.
        crowds: annotations that are regions to ignore; the rest are objects.
        sizes: (n,) square roots of the areas of the objects' boxes, pixels.
        areas: (n,) by which COCO sorts them, square pixels: the annotations' own, which are those
            of masks where there are any; else of the boxes.
        masks: objects with a segmentation.
        poses: objects with a labelled keypoint.
    """

    name: str
    images: int
    crowds: int
    sizes: np.ndarray
    areas: np.ndarray
    masks: int
    poses: int

    @property
    def objects(self) -> int:
        return len(self.sizes)

    @property
    def by_size(self) -> tuple[int, int, int]:
        """Objects that COCO calls small, medium and large."""
        small, large = (self.areas < SIZE_LIMITS[0]).sum(), (self.areas > SIZE_LIMITS[1]).sum()
        return int(small), int(self.objects - small - large), int(large)


def class_statistics(data: dict[str, Any]) -> list[ClassStatistics]:
    """Of each category by ascending id, which is the order of the model's classes.

    Args:
        data: as :func:`lsnet_d2.data.coco_json.read_coco_json` returns it, with usable boxes.
    """
    of_category = defaultdict(list)
    for annotation in data["annotations"]:
        if is_id(annotation["category_id"]):  # a report keeps what is no category's
            of_category[annotation["category_id"]].append(annotation)
    statistics = []
    for category in sorted(data["categories"], key=lambda category: category["id"]):
        found = of_category[category["id"]]
        objects = [a for a in found if not is_region(a)]
        statistics.append(
            ClassStatistics(
                name=category["name"],
                images=len({a["image_id"] for a in objects}),
                crowds=len(found) - len(objects),
                sizes=np.sqrt([a["bbox"][2] * a["bbox"][3] for a in objects]),
                areas=np.array([_area(a) for a in objects], dtype=float),
                masks=sum(bool(a.get("segmentation")) for a in objects),
                poses=sum(any(v > 0 for v in _visibilities(a)) for a in objects),
            )
        )
    return statistics


def _area(annotation: dict) -> float:
    area = annotation.get("area")
    return area if isinstance(area, (int, float)) else annotation["bbox"][2] * annotation["bbox"][3]


def _visibilities(annotation: dict) -> list[float]:
    return (annotation.get("keypoints") or [])[2::3]


def format_statistics(data: dict[str, Any]) -> str:
    """Images, a table of the classes, and the keypoints with their pairs, as lines of text."""
    classes = class_statistics(data)
    used = {annotation["image_id"] for annotation in data["annotations"]}
    sizes = Counter((image["width"], image["height"]) for image in data["images"])
    (width, height), count = sizes.most_common(1)[0]
    lines = [
        f"{len(data['images'])} images, {len(data['images']) - len(used)} of them without objects; "
        f"the most frequent size is {width} x {height} ({count} images)",
        "",
        tabulate(
            [
                [c.name, c.objects, c.images, *c.by_size, *_spread(c.sizes), c.masks, c.poses]
                + [c.crowds]
                for c in classes
            ],
            headers=["class", "objects", "images", "small", "medium", "large"]
            + [f"{100 * q:g}% size" for q in _QUANTILES]
            + ["masks", "poses", "crowds"],
        ),
        "",
        "size: the square root of the box's area in pixels; small: an area (of the mask, where the "
        "annotation has it) below 32 x 32, large: above 96 x 96",
    ]
    return "\n".join([*lines, *_format_keypoints(data)])


def _spread(sizes: np.ndarray) -> list[str]:
    if not len(sizes):
        return ["-"] * len(_QUANTILES)
    return [f"{size:.0f}" for size in np.quantile(sizes, _QUANTILES)]


def _format_keypoints(data: dict[str, Any]) -> list[str]:
    skeleton = skeleton_metadata(data["categories"])
    if not skeleton:
        return []
    names = skeleton["keypoint_names"]
    posed = [a for a in data["annotations"] if len(_visibilities(a)) == len(names)]
    labelled = np.array([_visibilities(a) for a in posed]).reshape(-1, len(names)) > 0
    pairs = ", ".join(f"{left} - {right}" for left, right in skeleton["keypoint_flip_map"])
    return [
        "",
        f"{len(names)} keypoints, labelled in so many objects: "
        + ", ".join(f"{n} {c}" for n, c in zip(names, labelled.sum(axis=0), strict=True)),
        f"exchanged in a mirrored image: {pairs or 'none'}",
    ]


def plot_statistics(data: dict[str, Any], file: IO[bytes]) -> None:
    """Write a picture (PNG): objects by class, and their sizes."""
    classes = class_statistics(data)
    figure = Figure(figsize=(11, max(4, 0.25 * len(classes))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    positions = np.arange(len(classes))
    start = np.zeros(len(classes))
    for index, label in enumerate(("small", "medium", "large")):
        counts = np.array([c.by_size[index] for c in classes])
        left.barh(positions, counts, left=start, label=label)
        start += counts
    left.set_yticks(positions, [c.name for c in classes])
    left.invert_yaxis()
    left.set_xlabel("objects")
    left.legend()
    sizes = np.concatenate([c.sizes for c in classes])
    if len(sizes):
        edges = np.geomspace(sizes.min() / 1.01, sizes.max() * 1.01, 30)
        right.hist(sizes, bins=edges)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    for limit in SIZE_LIMITS:
        right.axvline(limit**0.5, color="grey", linestyle="--")
    right.set_xlabel("square root of the box's area, pixels")
    right.set_ylabel("objects")
    figure.savefig(file, format="png", dpi=120)
