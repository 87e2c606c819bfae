#!/usr/bin/env python
"""Write extreme points into a COCO annotation file, in the form of the released LSNet code.

Training needs them only with INPUT.EXTREME_POINTS "annotation"; by default they are derived from
the segmentation as it is after augmentation.
"""

import argparse
import json

from tqdm import tqdm

from lsnet_d2.data.annotation_checks import raise_problems, read_boxes
from lsnet_d2.data.coco_json import coco_extreme_points, read_coco_json
from lsnet_d2.errors import exit_on_user_error
from lsnet_d2.files import atomic_write, require_new_file


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", metavar="IN.json", help="a file in COCO's format")
    parser.add_argument("output", metavar="OUT.json", help="the same with 'extreme_points'")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT.json, which may be IN.json"
    )
    parser.add_argument(
        "--masks",
        choices=["contour", "pixels"],
        default="contour",
        help="points of an RLE: from its outline, or from its pixels as in the released code",
    )
    return parser


def add_extreme_points(data: dict, where: str, masks: str) -> int:
    """Set ``extreme_points`` of all annotations; returns how many have only their box for it.

    Raises:
        AnnotationError: annotations are malformed, or of no image in the file.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
    problems, without = [], 0
    _, malformed = read_boxes([annotation["bbox"] for annotation in data["annotations"]])
    bar = tqdm(data["annotations"], unit="objects", unit_scale=True)
    for index, annotation in enumerate(bar):
        try:
            if index in malformed:
                raise ValueError(malformed[index])
            if annotation["image_id"] not in sizes:
                raise ValueError(f"image {annotation['image_id']} is not in the file")
            size = sizes[annotation["image_id"]]
            annotation["extreme_points"] = coco_extreme_points(annotation, *size, masks=masks)
            without += not annotation.get("segmentation")
        except ValueError as error:
            problems.append(f"annotation {annotation['id']}: {error}")
    raise_problems(where, problems)
    return without


@exit_on_user_error()
def main() -> None:
    args = get_parser().parse_args()
    require_new_file(args.output, overwrite=args.overwrite)
    data = read_coco_json(args.input)
    without = add_extreme_points(data, args.input, args.masks)
    with atomic_write(args.output, "w") as file:
        json.dump(data, file)
    total = len(data["annotations"])
    print(f"{args.output}: {total} annotations, {without} of them with middles of box sides")


if __name__ == "__main__":
    main()
