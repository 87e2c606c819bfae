#!/usr/bin/env python
"""Train on a few images of a COCO file and evaluate on the same: can these annotations be learned?

A model that cannot learn eight images by heart has a mistake in its data or its config. The images
taken are the first ones with objects (with --keypoints: with labelled keypoints), shown in training
as in tests: neither cropped nor mirrored, in one size. The number of classes is the file's.
"""

import argparse
import json
import os

from detectron2.config import CfgNode

from lsnet_d2.config_file import CONFIG_HELP, classes_key, load_config, merge_config
from lsnet_d2.data.annotation_checks import is_region
from lsnet_d2.data.coco_json import read_coco_json
from lsnet_d2.engine import LSNetTrainer
from lsnet_d2.errors import UserError, exit_on_user_error
from lsnet_d2.files import atomic_write, make_folder
from lsnet_d2.run_setup import log_setup
from lsnet_d2.solver import NO_EVALUATIONS, scale_schedule, schedule_of_length

DATASET = "overfit"
ITERATIONS = 1150  # unless the options say otherwise; a config's own are for more images


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", metavar="DATA.json", help="a file in COCO's format")
    parser.add_argument("images", metavar="IMAGES/", help="the folder of its images")
    parser.add_argument("--config-file", required=True, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--keypoints", action="store_true", help="images with labelled keypoints")
    parser.add_argument("--output", default="output/overfit", help="folder for all results")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="last: KEY VALUE pairs of the config"
    )
    return parser


def first_images(data: dict, count: int, keypoints: bool = False) -> dict:
    """The part of a COCO file that has its first ``count`` images with objects.

    Args:
        keypoints: an object counts if one of its keypoints is labelled.
    """
    wanted = {
        annotation["image_id"]
        for annotation in data["annotations"]
        if not is_region(annotation)
        and (not keypoints or any(v > 0 for v in (annotation.get("keypoints") or ())[2::3]))
    }
    images = [image for image in data["images"] if image["id"] in wanted][:count]
    ids = {image["id"] for image in images}
    annotations = [a for a in data["annotations"] if a["image_id"] in ids]
    return {**data, "images": images, "annotations": annotations}


def as_opts(options: dict[str, object]) -> list[str]:
    return [word for key, value in options.items() for word in (key, repr(value))]


def as_in_tests(cfg: CfgNode) -> dict[str, object]:
    """The options that show images in training as tests do: whole, in one size, never mirrored."""
    return {
        "INPUT.RANDOM_FLIP": "none",
        "INPUT.CROP.ENABLED": False,
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
        "INPUT.MIN_SIZE_TRAIN": (cfg.INPUT.MIN_SIZE_TEST,),
        "INPUT.MAX_SIZE_TRAIN": cfg.INPUT.MAX_SIZE_TEST,
    }


def short_schedule(cfg: CfgNode) -> dict[str, object]:
    """The options that give a config the schedule for few images."""
    return {**schedule_of_length(cfg, ITERATIONS), **NO_EVALUATIONS}


@exit_on_user_error()
def main() -> None:
    args = get_parser().parse_args()
    data = first_images(read_coco_json(args.annotations), args.num_images, args.keypoints)
    if not data["images"]:
        raise UserError(f"{args.annotations}: no image with objects to learn")
    make_folder(args.output)
    subset = os.path.join(args.output, "annotations.json")
    with atomic_write(subset, "w") as file:
        json.dump(data, file)

    # In the config that is saved, so that other tools know the data.
    given = merge_config(args.config_file, args.opts)
    files = [[DATASET, os.path.abspath(subset), os.path.abspath(args.images)]]
    files += [file for file in given.DATASETS.COCO_FILES if file[0] != DATASET]  # an earlier one's

    options = {
        **({} if "SOLVER.MAX_ITER" in args.opts else short_schedule(given)),
        **as_in_tests(given),
        "DATASETS.TRAIN": (DATASET,),
        "DATASETS.TEST": (DATASET,),
        "OUTPUT_DIR": args.output,
    }
    opts = [*as_opts(options), *args.opts, *as_opts({"DATASETS.COCO_FILES": files})]
    cfg = load_config(args.config_file, opts)
    scale_schedule(cfg, given=opts[::2])
    if classes_key(cfg) not in args.opts:
        cfg.merge_from_list([classes_key(cfg), len(data["categories"])])
    cfg.freeze()
    log_setup(cfg, argparse.Namespace(config_file=args.config_file))
    trainer = LSNetTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


if __name__ == "__main__":
    main()
