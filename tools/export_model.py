#!/usr/bin/env python
"""Write a model as one file that runs without this package (docs/export.md).

The file is compared with the model on an image in three sizes, and only written if the detections
are the same.
"""

import argparse
import logging

import numpy as np
import torch
from detectron2.utils.logger import setup_logger
from torch import Tensor

from lsnet_d2 import LSNetPredictor
from lsnet_d2.config_file import CONFIG_HELP, load_config
from lsnet_d2.data.images import convert_image, read_image
from lsnet_d2.data.shapes_scene import draw_scene
from lsnet_d2.errors import UserError, exit_on_user_error
from lsnet_d2.export import (
    DetectingModule,
    compare,
    describe,
    export_onnx,
    export_program,
    load_onnx,
    load_program,
)
from lsnet_d2.files import atomic_write, require_new_file

FORMATS = {"onnx": (export_onnx, load_onnx), "torch_export": (export_program, load_program)}
# Pixels and scores by which the file may differ from the model.
PIXELS, SCORES, MASKS = 0.05, 1e-3, 0.02
SCENE_SIZE = 320

logger = logging.getLogger("lsnet_d2.export")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--format", choices=FORMATS, default="onnx")
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    parser.add_argument(
        "--check",
        metavar="IMAGE",
        help="that file and model are compared on; a drawing if not given",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config: MODEL.WEIGHTS ..."
    )
    return parser


def check_images(predictor: LSNetPredictor, path: str | None) -> list[Tensor]:
    """An image (3, H, W) uint8 as the model takes it: in the size of evaluation, turned on its
    side, and larger by a fourth."""
    image_format = predictor.cfg.INPUT.FORMAT
    if path:
        pixels = read_image(path, image_format)
    else:
        scene = draw_scene(np.random.default_rng(0), SCENE_SIZE).image[:, : SCENE_SIZE * 3 // 4]
        pixels = convert_image(scene, image_format, array_format="RGB")
    image = predictor.resize(pixels, path or "a generated scene")
    larger = torch.nn.functional.interpolate(image[None].float(), scale_factor=1.25)[0]
    return [image, image.transpose(1, 2).contiguous(), larger.to(torch.uint8)]


@torch.no_grad()
def check(predictor: LSNetPredictor, load, data: bytes, path: str | None) -> None:
    """
    Raises:
        UserError: the detections of the file are not those of the model.
    """
    module, run = DetectingModule(predictor.model), load(data)
    for image in check_images(predictor, path):
        height, width = image.shape[1:]
        found = compare(module.output_names, module(image), run(image))
        worst = ", ".join(f"{name} {value:.1e}" for name, value in found.differences.items())
        logger.info(
            "%d x %d: %d detections, largest differences: %s", height, width, found.count, worst
        )
        if not found.count:
            logger.warning("Nothing was detected: give --check an image with objects")
        for name, value in found.differences.items():
            most = MASKS if name == "masks" else SCORES if name.endswith("scores") else PIXELS
            if value > most:
                raise UserError(
                    f"{height} x {width}: {name} differ from the model's by {value:.2g}"
                )
        if found.missing:
            raise UserError(
                f"{height} x {width}: {found.missing} detections are the file's or the model's only"
            )


@exit_on_user_error()
def main() -> None:
    args = get_parser().parse_args()
    setup_logger(name="lsnet_d2")
    require_new_file(args.output, overwrite=args.overwrite)
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"], need_data_sets=False)
    if cfg.TEST.AUG.ENABLED:
        raise UserError(
            "TEST.AUG.ENABLED is True: augmentation cannot be exported; set it to False"
        )
    if cfg.MODEL.META_ARCHITECTURE != "LSNet":
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; only LSNet can be exported"
        )
    predictor = LSNetPredictor(cfg, device="cpu")
    export, load = FORMATS[args.format]
    logger.info("Tracing the model; this takes a minute or more")
    data = export(predictor.model, describe(predictor.cfg, predictor.metadata))
    check(predictor, load, data, args.check)
    with atomic_write(args.output) as file:
        file.write(data)
    logger.info("%s: %.1f MB", args.output, len(data) / 1e6)


if __name__ == "__main__":
    main()
