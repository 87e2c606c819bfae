"""Objects for the mapper: an image, annotations on it, what comes out."""

import numpy as np
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from lsnet_d2.data.dataset_mapper import LSNetDatasetMapper

HEIGHT, WIDTH = 60, 100
DIAMOND = [30, 10, 20, 25, 45, 50, 60, 35]  # top, left, bottom, right
SIDES = [[30, 10], [20, 25], [45, 50], [60, 35]]
OTHERS = [[32, 10], [20, 27], [44, 50], [60, 33]]  # annotated by hand


def annotation(bbox=(20, 10, 40, 40), segmentation=(DIAMOND,), **more):
    result = {
        "id": 7,
        "bbox": list(map(float, bbox)),
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 2,
        **more,
    }
    if segmentation is not None:
        result["segmentation"] = (
            segmentation if isinstance(segmentation, dict) else [list(p) for p in segmentation]
        )
    return result


def record(image, *annotations):
    return {
        "file_name": image,
        "height": HEIGHT,
        "width": WIDTH,
        "image_id": 3,
        "annotations": list(annotations),
    }


def mapper(*augmentations, **options):
    options = {"image_format": "BGR", **options}
    return LSNetDatasetMapper(True, augmentations=list(augmentations), **options)


def points_of(output):
    return output["instances"].gt_extreme_points.tolist()


def boxes_of(output):
    return output["instances"].gt_boxes.tensor.tolist()


def rle(mask):
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
