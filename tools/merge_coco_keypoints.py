#!/usr/bin/env python
"""Add the keypoints of one COCO annotation file to the objects of another, by annotation id.

COCO has people's keypoints in a file without other classes. A joint model needs them beside the
boxes and masks of all: $DETECTRON2_DATASETS/coco/annotations/joint_{train,val}2017.json.
"""

import argparse
import json

from lsnet_d2.data.annotation_checks import AnnotationError
from lsnet_d2.data.coco_json import read_coco_json
from lsnet_d2.data.keypoints import SKELETON_KEYS
from lsnet_d2.errors import UserError, exit_on_user_error
from lsnet_d2.files import atomic_write, require_new_file


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("instances", metavar="INSTANCES.json", help="objects of all classes")
    parser.add_argument("keypoints", metavar="KEYPOINTS.json", help="the objects with keypoints")
    parser.add_argument("output", metavar="OUT.json", help="INSTANCES.json with keypoints")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.json")
    return parser


def merge_keypoints(instances: dict, keypoints: dict) -> int:
    """Add keypoints to annotations, and skeletons to categories, in place.

    Returns:
        The number of objects that have keypoints now.

    Raises:
        AnnotationError: an object or a category with keypoints is not among the instances, or is
            another one there.
    """
    categories = {category["name"]: category for category in instances["categories"]}
    ids = {}
    for category in keypoints["categories"]:
        if not category.get("keypoints"):
            continue
        if category["name"] not in categories:
            raise AnnotationError(f"category {category['name']!r} is not among the instances'")
        target = categories[category["name"]]
        target.update({key: category[key] for key in SKELETON_KEYS if key in category})
        ids[category["id"]] = target["id"]
    objects = {annotation["id"]: annotation for annotation in instances["annotations"]}
    count = 0
    for annotation in keypoints["annotations"]:
        if not annotation.get("keypoints"):
            continue
        target = objects.get(annotation["id"])
        key = (annotation["image_id"], ids.get(annotation["category_id"]))
        if target is None or (target["image_id"], target["category_id"]) != key:
            raise AnnotationError(
                f"annotation {annotation['id']} with keypoints has no instance of the same id, "
                "image and category"
            )
        target["keypoints"] = annotation["keypoints"]
        target["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
        count += 1
    return count


@exit_on_user_error()
def main() -> None:
    args = get_parser().parse_args()
    require_new_file(args.output, overwrite=args.overwrite)
    instances = read_coco_json(args.instances)
    try:
        count = merge_keypoints(instances, read_coco_json(args.keypoints))
    except AnnotationError as error:
        raise UserError(f"{args.keypoints}: {error}") from error
    with atomic_write(args.output, "w") as file:
        json.dump(instances, file)
    total = len(instances["annotations"])
    print(f"{args.output}: {total} annotations, {count} of them with keypoints")


if __name__ == "__main__":
    main()
