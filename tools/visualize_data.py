#!/usr/bin/env python
"""Draw ground truth, as annotated or as the model gets it, with predictions beside it."""

import argparse
import copy
import json
import logging
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from PIL import Image
from tqdm import tqdm

import lsnet_d2  # noqa: F401  (registers the model, the backbones and the data sets)
from lsnet_d2.config_file import CONFIG_HELP, load_config
from lsnet_d2.data.annotation_checks import read_boxes
from lsnet_d2.data.catalog import reporting_data_errors
from lsnet_d2.data.images import encode_image, read_image
from lsnet_d2.data.polygons import decode_rle
from lsnet_d2.drawing import CONTOUR_STYLES, KEYPOINT_THRESHOLD
from lsnet_d2.errors import UserError, did_you_mean, exit_on_user_error
from lsnet_d2.files import atomic_write, make_folder
from lsnet_d2.loaders import build_mapper
from lsnet_d2.visualizer import LSNetVisualizer, side_by_side

# What a result may have besides its box, and the shape of an object's; 0 is any number above 0.
LANDMARKS = {"extreme_points": (4, 2), "contour": (0, 2), "keypoints": (0, 3)}

logger = logging.getLogger("lsnet_d2.visualize_data")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument(
        "--source",
        choices=["annotation", "dataloader"],
        default="annotation",
        help="annotation: what the file says; dataloader: augmented, as training gets it",
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="a registered data set; the config's first by default"
    )
    parser.add_argument(
        "--predictions", metavar="JSON", help="COCO results of an evaluation, drawn on the right"
    )
    parser.add_argument("--confidence-threshold", type=float, default=0.5)
    parser.add_argument(
        "--keypoint-threshold",
        type=float,
        default=KEYPOINT_THRESHOLD,
        help="predicted keypoints are drawn above this score of their own",
    )
    parser.add_argument(
        "--contours",
        choices=CONTOUR_STYLES,
        default="filled",
        help="how contours and masks are drawn",
    )
    parser.add_argument("--output-dir", required=True, metavar="DIR")
    parser.add_argument("--num", type=int, default=20, help="number of pictures")
    parser.add_argument(
        "--image-ids", nargs="+", metavar="ID", help="these, in this order, instead of --num"
    )
    parser.add_argument("--shuffle", action="store_true", help="others than the first ones")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the augmentation")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs")
    return parser


def load_dicts(cfg: CfgNode, args: argparse.Namespace) -> tuple[str, list[dict]]:
    """Name and dataset dicts of the data set to draw: with predictions, a test set."""
    names = cfg.DATASETS.TEST if args.predictions else cfg.DATASETS.TRAIN
    if not args.dataset and not names:
        raise UserError("the config names no data set: give --dataset")
    name = args.dataset or names[0]
    if name not in MetadataCatalog.list():
        raise UserError(
            f"data set {name!r} is not registered{did_you_mean(name, MetadataCatalog.list())}"
        )
    with reporting_data_errors([name]):
        dicts = get_detection_dataset_dicts([name], filter_empty=False)
    if args.image_ids:
        by_id = {str(record["image_id"]): record for record in dicts}
        missing = [number for number in args.image_ids if number not in by_id]
        if missing:
            raise UserError(f"--image-ids: data set {name} has no image {missing[0]}")
        return name, [by_id[number] for number in args.image_ids]
    if args.shuffle:
        random.Random(args.seed).shuffle(dicts)
    return name, dicts[: args.num]


def load_predictions(path: str, threshold: float) -> dict[int, list[dict]]:
    """Results above a score, by image. Landmarks are arrays of the shapes in LANDMARKS.

    Raises:
        UserError: no such file, or not a list of COCO results, or boxes, scores or landmarks that
            are malformed, or landmarks that only some of the results have.
    """
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--predictions {path}: {error}") from error
    if not isinstance(results, list) or not all(isinstance(r, dict) for r in results):
        raise UserError(f"--predictions {path}: not a list of COCO results")
    shapes = {key: shape for key, shape in LANDMARKS.items() if any(key in r for r in results)}
    masks = ["segmentation"] if any("segmentation" in r for r in results) else []
    _, malformed = read_boxes([r.get("bbox") for r in results])
    by_image = defaultdict(list)
    for index, result in enumerate(results):
        where = f"--predictions {path}: result number {index}"
        needed = ("image_id", "category_id", "bbox", "score", *shapes, *masks)
        missing = [key for key in needed if key not in result]
        if missing:
            raise UserError(f"{where} has no {missing[0]!r}")
        if index in malformed:
            raise UserError(f"{where}: {malformed[index]}")
        if not isinstance(result["score"], (int, float)):
            raise UserError(f"{where}: its score {result['score']!r} is not a number")
        if result["score"] < threshold:
            continue
        for key, shape in shapes.items():
            try:
                values = np.array(result[key], dtype=np.float32)
                if not values.size or not np.isfinite(values).all():
                    raise ValueError("not finite numbers")
                result[key] = values.reshape([size or -1 for size in shape])
            except (TypeError, ValueError) as error:
                raise UserError(f"{where}: malformed {key!r}: {error}") from error
            # all are like the first one
            shapes[key] = result[key].shape
        by_image[result["image_id"]].append(result)
    return by_image


def to_instances(
    results: list[dict], image_size: tuple[int, int], ids: dict[int, int]
) -> Instances:
    """COCO results of one image as the predictions that they were.

    Args:
        results: of :func:`load_predictions`.
        image_size: (height, width).
        ids: contiguous class of each category id.

    Raises:
        UserError: a mask is no RLE, damaged, or of another size than the image.
    """
    instances = Instances(image_size)
    boxes = torch.tensor([r["bbox"] for r in results], dtype=torch.float32).reshape(-1, 4)
    instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    instances.scores = torch.tensor([float(r["score"]) for r in results])
    instances.pred_classes = torch.tensor([ids[r["category_id"]] for r in results]).long()
    if not results:
        return instances

    def stacked(key: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([r[key] for r in results]))

    if "extreme_points" in results[0]:
        instances.pred_extreme_points = stacked("extreme_points")
    if "contour" in results[0]:  # the mask was made from it
        instances.pred_contours = stacked("contour")
    elif "segmentation" in results[0]:
        instances.pred_masks = torch.stack([to_mask(r, image_size) for r in results])
    if "keypoints" in results[0]:
        keypoints = stacked("keypoints")
        keypoints[:, :, :2] += 0.5  # Detectron2's evaluator writes them as indices of pixels
        instances.pred_keypoints = keypoints
    return instances


def to_mask(result: dict, image_size: tuple[int, int]) -> torch.Tensor:
    """The RLE of a result as a mask (H, W) bool.

    Raises:
        UserError: it is none, damaged, or of another size than the image.
    """
    try:
        if not isinstance(result["segmentation"], dict):
            raise ValueError("its 'segmentation' is not an RLE")
        return torch.from_numpy(decode_rle(result["segmentation"], *image_size)).bool()
    except ValueError as error:
        raise UserError(
            f"--predictions: a result of image {result['image_id']}: {error}"
        ) from error


def draw_annotation(record: dict, metadata, **style) -> np.ndarray:
    visualizer = LSNetVisualizer(read_image(record["file_name"], "RGB"), metadata, **style)
    return visualizer.draw_dataset_dict(record).get_image()


def draw_mapped(record: dict, metadata, image_format: str, **style) -> np.ndarray:
    image = convert_image_to_rgb(record["image"].permute(1, 2, 0), image_format)
    visualizer = LSNetVisualizer(image, metadata, **style)
    if len(record.get("ignore_boxes", ())):
        visualizer.draw_ignored(record["ignore_boxes"])
    return visualizer.draw_ground_truth(record["instances"]).get_image()


def draw_predictions(
    record: dict, metadata, results: list[dict], ids: dict[int, int], **style
) -> np.ndarray:
    image = read_image(record["file_name"], "RGB")
    visualizer = LSNetVisualizer(image, metadata, **style)
    instances = to_instances(results, image.shape[:2], ids)
    return visualizer.draw_instance_predictions(instances).get_image()


@exit_on_user_error()
def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    if args.predictions and args.source == "dataloader":
        parser.error("predictions belong to whole images: use --source annotation")
    setup_logger(name="lsnet_d2")
    cfg = load_config(args.config_file, args.opts)
    predictions = None
    if args.predictions:
        predictions = load_predictions(args.predictions, args.confidence_threshold)
    name, dicts = load_dicts(cfg, args)
    metadata = MetadataCatalog.get(name)
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {
        index: index for index in range(len(metadata.get("thing_classes", [])))
    }
    if predictions:
        check_predictions(predictions, args.predictions, ids)
    mapper = build_mapper(cfg, is_train=True) if args.source == "dataloader" else None
    seed_all_rng(args.seed)
    style = {"contours": args.contours, "keypoint_threshold": args.keypoint_threshold}
    folder = Path(args.output_dir)
    make_folder(folder)
    for index, record in enumerate(tqdm(dicts, disable=None)):
        if mapper:
            mapped = mapper(copy.deepcopy(record))
            picture = draw_mapped(mapped, metadata, cfg.INPUT.FORMAT, **style)
        else:
            picture = draw_annotation(record, metadata, **style)
        if predictions is not None:
            results = predictions.get(record["image_id"], [])
            right = draw_predictions(record, metadata, results, ids, **style)
            picture = side_by_side(picture, right)
        with atomic_write(folder / f"{index:04d}_{Path(record['file_name']).stem}.png") as file:
            file.write(encode_image(Image.fromarray(picture), "PNG"))
    logger.info("%d pictures written to %s", len(dicts), folder)


def check_predictions(predictions: dict[int, list[dict]], path: str, ids: dict[int, int]) -> None:
    """
    Raises:
        UserError: a category is not one of the data set's.
    """
    for results in predictions.values():
        for result in results:
            if result["category_id"] not in ids:
                raise UserError(
                    f"--predictions {path}: category {result['category_id']} of image "
                    f"{result['image_id']} is not in the data set"
                )


if __name__ == "__main__":
    main()
