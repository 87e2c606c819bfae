"""From a dataset dict to an augmented image with the ground truth of LSNet."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints, PolygonMasks

from ..errors import ConfigError
from ..tasks import branch_weights
from .annotation_checks import AnnotationError, is_region, name_annotation
from .contours import CONTOUR_METHODS, resample_contour
from .extreme_points import as_extreme_points, extreme_points, side_midpoints
from .images import ImageError, NamedAugInput, read_image
from .keypoints import as_keypoints, keypoint_flip_indices
from .polygons import bounding_box, decode_rle, segmentation_to_outlines
from .viewport import Viewport

logger = logging.getLogger(__name__)

EXTREME_POINT_SOURCES = ("segmentation", "annotation")
# Pixels of the augmented image. Of what is thinner, a prediction on the wrong side would be as far
# as hundreds of such objects, and outweigh all others in the loss.
_MIN_SIDE = 1.0


@dataclass(frozen=True, kw_only=True)
class VisibleObject:
    """What the augmented image shows of one annotation, in that image's pixels.

    Attributes:
        annotation: as it is in the dataset dict.
        name: of the annotation, for messages.
        box: (4,) XYXY.
        polygons: visible parts (n, 2) of its segmentation; empty when it has no usable one.
        holes: visible parts of the holes in it.
        cut: whether a part of its box is out of sight.
    """

    annotation: dict
    name: str
    box: np.ndarray
    polygons: list[np.ndarray]
    holes: list[np.ndarray]
    cut: bool


class LSNetDatasetMapper(DatasetMapper):
    """Detectron2's mapper, with LSNet's landmarks derived after the augmentation.

    In training the output has ``instances`` and ``ignore_boxes``, in pixels of the augmented image,
    and an image without annotations has both of length 0:

    - ``gt_boxes``: the annotation's box. Where the augmentation rotates the image, or cuts the
      object, the box around what is visible of its segmentation.
    - ``gt_classes``.
    - ``gt_extreme_points`` (N, 4, 2) float32, in the image: top, left, bottom, right.
    - ``gt_contours`` (N, P, 2) float32, in the image, with ``use_contour``: see
      :func:`lsnet_d2.data.contours.resample_contour`; NaN for an object without segmentation.
    - ``gt_masks`` and ``gt_keypoints`` with ``use_instance_mask`` and ``use_keypoint``. Keypoints
      are zero for an object without any, and those out of sight.
    - ``ignore_boxes`` (K, 4) float32, XYXY: crowds, and objects with the key "ignore". They are no
      instances.

    Objects out of sight are dropped. A segmentation of which no part is usable (see
    :func:`lsnet_d2.data.polygons.is_usable`) counts as none; an object without any has the middles
    of its box's sides for extreme points. Nothing is written into the input. Semantic maps and
    precomputed proposals are left alone.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        use_extreme_points: bool = True,
        use_contour: bool = False,
        extreme_points: str = "segmentation",
        num_contour_points: int = 36,
        contour_sampling: str = "adaptive",
        **kwargs: Any,
    ) -> None:
        """
        Args:
            is_train: without it the output has the image only.
            use_extreme_points, use_contour: whether these fields are made, like Detectron2's
                ``use_instance_mask`` and ``use_keypoint``.
            extreme_points: "segmentation" derives them from the augmented segmentation.
                "annotation" takes the annotation's ``extreme_points``, those of the original
                image, wherever the augmentation neither cuts the object nor rotates the image.
                An object without segmentation uses its ``extreme_points`` in both cases.
            num_contour_points: P.
            contour_sampling: "adaptive" or "reference".
            kwargs: of :class:`detectron2.data.DatasetMapper`.

        Raises:
            ConfigError: an option has an unknown value; the message names the config's key.
        """
        super().__init__(is_train, **kwargs)
        for key, value, known in (
            ("EXTREME_POINTS", extreme_points, EXTREME_POINT_SOURCES),
            ("CONTOUR_SAMPLING", contour_sampling, CONTOUR_METHODS),
        ):
            if value not in known:
                raise ConfigError(f"INPUT.{key} is {value!r}; it must be one of {', '.join(known)}")
        self.use_extreme_points = use_extreme_points
        self.use_contour = use_contour
        self.extreme_points = extreme_points
        self.num_contour_points = num_contour_points
        self.contour_sampling = contour_sampling
        self._reported_box_only = False

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        arguments = super().from_config(cfg, is_train)
        # boxes of what is visible need no masks here
        arguments["recompute_boxes"] = False
        arguments["extreme_points"] = cfg.INPUT.EXTREME_POINTS
        arguments["num_contour_points"] = cfg.MODEL.LSNET.NUM_CONTOUR_POINTS
        arguments["contour_sampling"] = cfg.INPUT.CONTOUR_SAMPLING
        branches = branch_weights(cfg)
        arguments["use_extreme_points"] = "extreme" in branches
        arguments["use_contour"] = "contour" in branches
        if "keypoint" in branches and is_train:
            arguments["use_keypoint"] = True
            arguments["keypoint_hflip_indices"] = keypoint_flip_indices(
                cfg.DATASETS.TRAIN, cfg.MODEL.LSNET.NUM_KEYPOINTS
            )
        return arguments

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict: one image in Detectron2's format.

        Returns:
            A new dict with "image", a tensor (C, H, W), and in training what the class says.

        Raises:
            ImageError: the file cannot be read, its size is not that of the dict, or resizing
                leaves nothing of it.
            AnnotationError: a mask or the extreme points of an annotation are malformed.
        """
        dataset_dict = dict(dataset_dict)
        image = read_image(dataset_dict["file_name"], self.image_format)
        try:
            utils.check_image_size(dataset_dict, image)
        except utils.SizeMismatchError as error:
            raise ImageError(str(error)) from error
        aug_input = NamedAugInput(image, dataset_dict["file_name"])
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        dataset_dict["image"] = torch.from_numpy(image.transpose(2, 0, 1).copy())
        if self.is_train:
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        dataset_dict.pop("annotations", None)
        return dataset_dict

    def _transform_annotations(
        self, dataset_dict: dict, transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        viewport = Viewport(
            transforms,
            original_size=(dataset_dict["height"], dataset_dict["width"]),
            image_size=image_shape,
        )
        annotations = dataset_dict.get("annotations", [])
        boxes, cut = viewport.boxes(
            np.array(
                [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
            )
        )
        objects, ignored = [], []
        for index, annotation in enumerate(annotations):
            if is_region(annotation):
                ignored += [boxes[index]] if _has_area(boxes[index]) else []
                continue
            name = name_annotation(dataset_dict, index)
            seen = self._see(annotation, name, boxes[index], bool(cut[index]), viewport)
            objects += [seen] if seen else []
        dataset_dict["instances"] = self._to_instances(objects, viewport)
        dataset_dict["ignore_boxes"] = _to_tensor(ignored, (4,))

    def _see(
        self, annotation: dict, name: str, box: np.ndarray, cut: bool, viewport: Viewport
    ) -> VisibleObject | None:
        try:
            whole, holes = segmentation_to_outlines(
                annotation.get("segmentation"), *viewport.original_size
            )
        except ValueError as error:
            raise AnnotationError(f"{name}: {error}") from error
        polygons = viewport.polygons(whole)
        if whole and not polygons and cut:
            return None
        if polygons and (cut or not viewport.axis_aligned):
            box = bounding_box(polygons)
        if not _has_area(box):
            return None
        return VisibleObject(
            annotation=annotation,
            name=name,
            box=box,
            polygons=polygons,
            holes=viewport.polygons(holes),
            cut=cut,
        )

    def _to_instances(self, objects: list[VisibleObject], viewport: Viewport) -> Instances:
        instances = Instances(viewport.image_size)
        instances.gt_boxes = Boxes(_to_tensor([o.box for o in objects], (4,)))
        instances.gt_classes = torch.tensor(
            [int(o.annotation["category_id"]) for o in objects], dtype=torch.int64
        )
        if self.use_extreme_points:
            points = [self._extreme_points(o, viewport) for o in objects]
            instances.gt_extreme_points = _to_tensor(points, (4, 2))
        if self.use_contour:
            contours = [self._contour(o) for o in objects]
            instances.gt_contours = _to_tensor(contours, (self.num_contour_points, 2))
        if self.use_keypoint:
            keypoints = [self._keypoints(o, viewport) for o in objects]
            shape = (len(self.keypoint_hflip_indices), 3)
            instances.gt_keypoints = Keypoints(_to_tensor(keypoints, shape))
        if self.use_instance_mask:
            instances.gt_masks = self._masks(objects, viewport)
        return instances

    def _contour(self, seen: VisibleObject) -> np.ndarray:
        if not seen.polygons:
            return np.full((self.num_contour_points, 2), np.nan)
        return resample_contour(
            seen.polygons,
            self.num_contour_points,
            box=seen.box,
            method=self.contour_sampling,
            holes=seen.holes,
        )

    def _extreme_points(self, seen: VisibleObject, viewport: Viewport) -> np.ndarray:
        height, width = viewport.image_size
        annotated = seen.annotation.get("extreme_points")
        if self.extreme_points == "annotation" and annotated is None and seen.polygons:
            raise AnnotationError(
                f"{seen.name}: no 'extreme_points', but INPUT.EXTREME_POINTS is 'annotation'. "
                "tools/gen_coco_lsvr.py writes them; "
                "lsnet_d2.data.coco_json.load_lsnet_json reads them (Detectron2's loader does not)"
            )
        whole = viewport.axis_aligned and not seen.cut
        if annotated is not None and (
            not seen.polygons or (self.extreme_points == "annotation" and whole)
        ):
            try:
                points = viewport.sides(as_extreme_points(annotated))
            except ValueError as error:
                raise AnnotationError(f"{seen.name}: {error}") from error
            if seen.cut:
                points = np.clip(points, seen.box[:2], seen.box[2:])
        elif seen.polygons:
            points = extreme_points(seen.polygons, joined=False)
        else:
            self._report_box_only(seen.name)
            points = side_midpoints(seen.box)
        return np.clip(points, 0, [width, height])

    def _report_box_only(self, name: str) -> None:
        """Say it once, and of several workers let the first one speak."""
        worker = torch.utils.data.get_worker_info()
        if not self._reported_box_only and (worker is None or worker.id == 0):
            logger.warning(
                "%s: only a box to go by; the middles of its sides are its extreme points. "
                "Further such objects are not reported.",
                name,
            )
        self._reported_box_only = True

    def _masks(self, objects: list[VisibleObject], viewport: Viewport) -> PolygonMasks | BitMasks:
        """Polygons; or bitmaps, which keep the holes of an RLE. A box where there is only that."""
        if self.instance_mask_format == "polygon":
            return PolygonMasks(
                [[p.reshape(-1) for p in o.polygons] or [_rectangle(o.box)] for o in objects]
            )
        height, width = viewport.image_size
        bitmaps = np.zeros((len(objects), height, width), dtype=bool)
        for bitmap, seen in zip(bitmaps, objects, strict=True):
            segmentation = seen.annotation.get("segmentation")
            if isinstance(segmentation, dict) and seen.polygons:
                mask = decode_rle(segmentation, *viewport.original_size)
                bitmap[:] = viewport.transforms.apply_segmentation(mask)
            else:
                outlines = [p.reshape(-1) for p in seen.polygons] or [_rectangle(seen.box)]
                bitmap[:] = utils.polygons_to_bitmask(outlines, height, width)
        return BitMasks(torch.from_numpy(bitmaps))

    def _keypoints(self, seen: VisibleObject, viewport: Viewport) -> np.ndarray:
        """(K, 3); all zero for an object without keypoints."""
        count = len(self.keypoint_hflip_indices)
        try:
            keypoints = as_keypoints(seen.annotation.get("keypoints"), count)
        except ValueError as error:
            raise AnnotationError(f"{seen.name}: {error}") from error
        # Detectron2 exchanges left and right for horizontal flips alone: here it exchanges none.
        keypoints = utils.transform_keypoint_annotations(
            keypoints, viewport.transforms, viewport.image_size, np.arange(count)
        )
        return keypoints[self.keypoint_hflip_indices] if viewport.mirrored else keypoints


def _has_area(box: np.ndarray) -> bool:
    return bool((box[2:] - box[:2] >= _MIN_SIDE).all())


def _rectangle(box: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = box
    return np.array([x0, y0, x0, y1, x1, y1, x1, y0])


def _to_tensor(rows: list[np.ndarray], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(-1, *shape))
