#!/usr/bin/env python
"""Detect objects in images, folders, videos or a webcam's stream, and draw them."""

import argparse
import glob
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from PIL import Image
from tqdm import tqdm

from lsnet_d2 import LSNetPredictor
from lsnet_d2.config_file import CONFIG_HELP, load_config
from lsnet_d2.data.images import IMAGE_SUFFIXES, ImageError, ImageLike, encode_image
from lsnet_d2.drawing import CONTOUR_STYLES, KEYPOINT_THRESHOLD
from lsnet_d2.errors import UserError, exit_on_user_error
from lsnet_d2.files import atomic_write, make_folder
from lsnet_d2.tracking import Tracker

WRITTEN_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
WINDOW = "LSNet"
_HIGHEST_RATE = 240  # frames a second that are believed

logger = logging.getLogger("lsnet_d2.demo")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help=CONFIG_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="images, folders or globs")
    source.add_argument("--video-input", metavar="FILE")
    source.add_argument("--webcam", action="store_true", help="the first camera")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="folder for the results, or a file for one image or video; "
        "without it they are shown in a window",
    )
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, help="lowest score that is drawn"
    )
    parser.add_argument(
        "--keypoint-threshold",
        type=float,
        default=KEYPOINT_THRESHOLD,
        help="keypoints are drawn above this score of their own",
    )
    parser.add_argument(
        "--contours", choices=CONTOUR_STYLES, default="filled", help="how contours are drawn"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, at the end"
    )
    return parser


class Detector:
    """A predictor that draws what it finds. Arrays are (H, W, 3) RGB."""

    def __init__(self, cfg: CfgNode, threshold: float, **style: Any) -> None:
        """
        Args:
            threshold: lowest score of a detection.
            style: of :class:`lsnet_d2.visualizer.LSNetVisualizer`.
        """
        self.predictor = LSNetPredictor(
            cfg, device=cfg.MODEL.DEVICE, array_format="RGB", score_thresh=threshold
        )
        self.style = style

    def draw(self, image: ImageLike, tracker: Tracker | None = None) -> tuple[np.ndarray, int]:
        """The picture (RGB) and the number of objects in it.

        Args:
            image: see :class:`LSNetPredictor`.
            tracker: of the video that the image is the next frame of; it chooses the colours.
        """
        results = self.predictor(image)
        identities = tracker.update(results) if tracker else None
        picture = results.draw(image, identities=identities, **self.style)
        return np.asarray(picture), len(results)


def find_images(patterns: list[str]) -> list[Path]:
    """Files that the arguments name: files themselves, images in folders, matches of globs.

    Raises:
        UserError: an argument names nothing.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(os.path.expanduser(pattern)))
        if not files:
            raise UserError(f"--input {pattern}: no such image, or folder without images")
        found += files
    return list(dict.fromkeys(found))


def plan_outputs(images: list[Path], output: str) -> dict[Path, Path]:
    """Where the picture of each image goes: below ``output`` as the images lie to one another.

    Raises:
        UserError: an image would be overwritten, several would be written to one file, or
            ``output`` is a file but must be a folder.
    """
    target = Path(output)
    if len(images) == 1 and target.suffix.lower() in WRITTEN_SUFFIXES and not target.is_dir():
        plan = {images[0]: target}
    else:
        require_folder(target)
        # as they are named: where links lead may be one place, or say nothing
        named = {image: Path(os.path.abspath(image)) for image in images}
        root = os.path.commonpath([path.parent for path in named.values()])
        plan = {image: target / path.relative_to(root) for image, path in named.items()}
    for image, file in plan.items():
        if file.suffix.lower() not in WRITTEN_SUFFIXES:
            plan[image] = file.with_name(file.name + ".png")
    sources = {image.resolve() for image in images}
    counts = Counter(plan.values())
    for file in plan.values():
        if counts[file] > 1:
            raise UserError(f"{counts[file]} of the images would be written to {file}")
        if file.resolve() in sources:
            raise UserError(f"--output would overwrite the input {file}")
    return plan


def require_folder(output: Path) -> None:
    """
    Raises:
        UserError: there is something of that name which is no folder.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; here it must be a folder")


def run_on_images(detector: Detector, patterns: list[str], output: str | None) -> int:
    """Draw all images, going on after one that cannot be used. Returns how many could not."""
    images = find_images(patterns)
    plan = plan_outputs(images, output) if output else {}
    failed = 0
    for path in tqdm(images, disable=None):
        start = time.perf_counter()
        try:
            picture, count = detector.draw(path)
        except ImageError as error:
            logger.error("%s", error)
            failed += 1
            continue
        logger.info("%s: %d objects in %.2f s", path, count, time.perf_counter() - start)
        if not output:
            if not show(picture, wait=True):
                break
            continue
        make_folder(plan[path].parent)
        with atomic_write(plan[path]) as file:
            file_format = WRITTEN_SUFFIXES[plan[path].suffix.lower()]
            file.write(encode_image(Image.fromarray(picture), file_format, quality=95))
    if failed:
        logger.error("%d of %d images could not be used", failed, len(images))
    return failed


def frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """The rest of a stream, RGB."""
    while True:
        success, frame = capture.read()
        if not success:
            return
        yield frame[:, :, ::-1]


def plan_video(source: str | int, output: str) -> Path:
    """The file that a stream's pictures go to: ``output``, or in this folder one of its name.

    Raises:
        UserError: that is the stream itself, or ``output`` is a file but no video.
    """
    target = Path(output)
    if target.suffix.lower() not in {".mp4", ".mkv", ".avi"}:
        stem = "webcam" if isinstance(source, int) else Path(source).stem
        require_folder(target)
        target = target / f"{stem}.mp4"
    if not isinstance(source, int) and target.resolve() == Path(source).resolve():
        raise UserError(f"--output would overwrite the input {target}")
    return target


def run_on_video(detector: Detector, source: str | int, output: str | None) -> None:
    """Draw a stream frame by frame, into a file or a window (q or Esc ends it)."""
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        what = "a camera" if isinstance(source, int) else f"the video {source}"
        raise UserError(f"cannot open {what}")
    target = partial = writer = None
    if output:
        target = plan_video(source, output)
        make_folder(target.parent)
        # the container is chosen by the suffix
        partial = target.with_name(f".partial-{target.name}")
    count, stopped = 0, False
    said = capture.get(cv2.CAP_PROP_FRAME_COUNT)  # of a camera none
    tracker = Tracker()
    try:
        for frame in tqdm(frames(capture), unit="frame", disable=None):
            picture, _ = detector.draw(frame, tracker)
            count += 1
            if target is None:
                if not show(picture, wait=False):
                    stopped = True
                    break
                continue
            if writer is None:
                writer = open_video(partial, picture.shape[:2], frame_rate(capture, source))
            writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
        if count == 0:
            raise UserError(f"there is no readable frame in {source}")
    except KeyboardInterrupt:
        stopped = True
        logger.info("Stopped by the user")
    finally:
        capture.release()
        if writer is not None:
            writer.release()
        if partial is not None and sys.exc_info()[0] is not None:
            partial.unlink(missing_ok=True)
    if not stopped and count < 0.95 * said:  # some files' numbers are estimates
        logger.warning("%s has %d frames, but only %d could be read", source, said, count)
    if writer is not None:
        keep_video(partial, target, count)
        logger.info("%d frames written to %s", count, target)


def frame_rate(capture: cv2.VideoCapture, source: str | int) -> float:
    """Frames a second. Some streams give the ticks of their clock, 90,000, or nothing."""
    rate = capture.get(cv2.CAP_PROP_FPS)
    if 1 <= rate <= _HIGHEST_RATE:
        return rate
    logger.warning("%s has %g frames a second by its own account; 25 are taken", source, rate)
    return 25.0


def keep_video(partial: Path, target: Path, count: int) -> None:
    """Give a video that was written its name.

    Raises:
        UserError: it is not complete, which OpenCV does not notice: a disk may be full. The file
            that had the name is still there.
    """
    written = cv2.VideoCapture(str(partial))
    frames_there = 0
    while written.grab():
        frames_there += 1
    written.release()
    if frames_there < count:
        partial.unlink()
        raise UserError(
            f"only {frames_there} of {count} frames could be written to {target}; is the disk full?"
        )
    os.replace(partial, target)


def open_video(path: Path, size: tuple[int, int], fps: float) -> cv2.VideoWriter:
    height, width = size
    codec = "mp4v" if path.suffix.lower() == ".mp4" else "XVID"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (width, height))
    if not writer.isOpened():
        raise UserError(f"OpenCV cannot write the video {path}")
    return writer


def show(picture: np.ndarray, wait: bool) -> bool:
    """Show an RGB picture; False when the user wants no more (q or Esc)."""
    cv2.imshow(WINDOW, np.ascontiguousarray(picture[:, :, ::-1]))
    return cv2.waitKey(0 if wait else 1) not in (27, ord("q"))


def require_window() -> None:
    """
    Raises:
        UserError: there is no display, or OpenCV was built without windows.
    """
    # Without a display, some builds of OpenCV end the process
    displays = ("DISPLAY", "WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not any(os.getenv(name) for name in displays):
        raise UserError("there is no display to show pictures on: give --output")
    try:
        cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
    except cv2.error as error:
        raise UserError("this OpenCV cannot show windows (headless): give --output") from error


@exit_on_user_error()
def main() -> None:
    args = get_parser().parse_args()
    setup_logger(name="lsnet_d2")
    setup_logger(name="fvcore")
    if not args.output:
        require_window()
    detector = Detector(
        load_config(args.config_file, args.opts, need_data_sets=False),
        args.confidence_threshold,
        contours=args.contours,
        keypoint_threshold=args.keypoint_threshold,
    )
    if args.input:
        sys.exit(1 if run_on_images(detector, args.input, args.output) else 0)
    run_on_video(detector, 0 if args.webcam else args.video_input, args.output)


if __name__ == "__main__":
    main()
