#!/usr/bin/env python
"""Check a COCO file before a training: every problem with its id, repairs, statistics, a config.

The exit status is 0 where there are no problems, 1 where there are some (with --fix: where some
are left in OUT.json), and 2 where the check could not be done.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from lsnet_d2.config_file import CHECKPOINT_SUFFIX
from lsnet_d2.data.coco_json import read_coco_json, read_coco_lists
from lsnet_d2.data.dataset_report import DatasetReport, report_dataset
from lsnet_d2.data.dataset_statistics import format_statistics, plot_statistics
from lsnet_d2.errors import UserError, exit_on_user_error
from lsnet_d2.files import atomic_write, require_new_file
from lsnet_d2.starting_config import CocoFile, starting_config

BASE_CONFIG = Path(__file__).resolve().parent.parent / "configs/plus/photos_joint.yaml"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", metavar="DATA.json", help="a file in COCO's format")
    parser.add_argument("images", metavar="IMAGES/", help="the folder of its images")
    parser.add_argument(
        "--quick", action="store_true", help="read only the heads of images, not their pixels"
    )
    parser.add_argument(
        "--fix", metavar="OUT.json", help="write what is left when repairs lose nothing usable"
    )
    parser.add_argument("--plot", metavar="OUT.png", help="draw classes and sizes")
    parser.add_argument(
        "--write-config",
        metavar="OUT.yaml",
        help="write a config to start training with, if the data (with --fix: OUT.json) have no "
        "problems, nor those of --val",
    )
    parser.add_argument(
        "--val",
        nargs=2,
        metavar=("VAL.json", "IMAGES/"),
        help="what the config evaluates on; checked too, but not repaired",
    )
    parser.add_argument(
        "--base-config",
        metavar="FILE",
        default=str(BASE_CONFIG),
        help="LSNet's config that the new one changes (default: a light backbone, for a CPU)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


def check(json_file: str, image_root: str, *, quick: bool, repairs: str) -> DatasetReport:
    """Print the problems of a file, and how many there are.

    Args:
        quick: do not read the images' pixels.
        repairs: what is said of those that can be repaired.

    Raises:
        UserError: there is no such file.
    """
    report = report_dataset(read_coco_lists(json_file), image_root, decode_images=not quick)
    for problem in report.problems:
        print(problem)
    repairable = len(report.problems) - len(report.remaining)
    print(f"{json_file}: problems: {len(report.problems)}, {repairs}: {repairable}\n")
    return report


def write_starting_config(args: argparse.Namespace, data: dict) -> None:
    test = None
    if args.val:
        test = CocoFile(
            json_file=args.val[0], image_root=args.val[1], data=read_coco_json(args.val[0])
        )
    text = starting_config(
        args.write_config,
        train=CocoFile(json_file=args.fix or args.annotations, image_root=args.images, data=data),
        test=test,
        base_config=args.base_config,
    )
    with atomic_write(args.write_config, "w") as file:
        file.write(text)
    print(f"{args.write_config}: a config to start with")


@exit_on_user_error()
def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    if args.val and not args.write_config:
        parser.error("--val is for the config: give --write-config")
    for path in filter(None, (args.fix, args.plot, args.write_config)):
        require_new_file(path, overwrite=args.overwrite)
    if args.fix and os.path.realpath(args.fix) == os.path.realpath(args.annotations):
        raise UserError(f"--fix {args.fix} is DATA.json itself; it stays as it is")
    if not os.path.isfile(args.base_config):
        raise UserError(f"--base-config {args.base_config}: no such config file")
    if args.base_config.endswith(CHECKPOINT_SUFFIX):
        raise UserError(f"--base-config {args.base_config}: a checkpoint; it must be a YAML file")
    for json_file, image_root in filter(None, [(args.annotations, args.images), args.val]):
        if not os.path.isdir(image_root):
            raise UserError(f"{json_file}: no folder of images {image_root}")
    repairs = "repaired" if args.fix else "that --fix repairs"
    report = check(args.annotations, args.images, quick=args.quick, repairs=repairs)
    left = report.remaining if args.fix else report.problems
    if args.fix:
        with atomic_write(args.fix, "w") as file:
            json.dump(report.repaired, file)
        print(f"{args.fix}: {len(report.repaired['annotations'])} annotations\n")
    if report.has_usable_lists:
        print(format_statistics(report.repaired))
        if args.plot:
            with atomic_write(args.plot) as file:
                plot_statistics(report.repaired, file)
    else:
        print("no statistics: the lists of the file cannot be used")
    if args.val:
        print()
        repairs = "that a check of this file with --fix repairs"
        left = [*left, *check(*args.val, quick=args.quick, repairs=repairs).problems]
    if args.write_config and left:
        print(f"{args.write_config} is not written; problems left: {len(left)}")
    elif args.write_config:
        write_starting_config(args, report.repaired)
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
