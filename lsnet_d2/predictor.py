"""From images to instances, in Python."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model

from .checkpointer import LSNetCheckpointer
from .config_file import check_config, merge_config, reporting_config_errors, resolve_device
from .data.builtin import register_coco_files
from .data.catalog import load_metadata
from .data.images import ImageLike, NamedAugInput, load_image
from .description import described_metadata
from .exports import Results
from .modeling import LSNetWithTTA
from .modeling.test_time_augmentation import batches_of_one_size, keep_image_sizes


class LSNetPredictor:
    """A model with its weights, for images of any kind.

    Images are resized as in evaluation, with ``TEST.AUG.ENABLED`` augmented as there, and the
    result is that of evaluation; it can be drawn and written for other programs (see
    :class:`lsnet_d2.Results`). A checkpoint of a training of this project is all that it needs: the
    data sets of the config need not be here, unless images are mirrored for a model with keypoints,
    and only their files say what the keypoints are. Where neither they nor the checkpoint say what
    classes are called, results have numbers for names.

    Attributes:
        cfg: the config, with the device and the weights that are used.
        metadata: of the first of ``DATASETS.TEST``; what the checkpoint says of classes and
            keypoints where its file is not here; None where there is neither.
        model: in evaluation mode.

    Examples:
        >>> predict = LSNetPredictor("model_final.pth")
        >>> results = predict("photo.jpg")
        >>> results.pred_boxes, results.scores, results.pred_extreme_points
        >>> results.draw().save("found.jpg")
        >>> json.dump(results.to_labelme(), file)
    """

    def __init__(
        self,
        config: str | os.PathLike | CfgNode,
        *,
        weights: str | os.PathLike | None = None,
        device: str = "auto",
        array_format: str = "BGR",
        score_thresh: float | None = None,
        batch_size: int = 1,
    ) -> None:
        """
        Args:
            config: a YAML file, a checkpoint, which has the config of its training, or a config,
                which is left as it is.
            weights: None: those of ``MODEL.WEIGHTS``, which of a checkpoint are its own.
            device: of torch; "auto" is a GPU where there is one, else the CPU. That of the config
                does not count.
            array_format: "BGR" or "RGB", the order of the channels of the arrays that are given.
                OpenCV and Detectron2's ``DefaultPredictor`` have BGR.
            score_thresh: lowest score of a detection; None: that of the config.
            batch_size: images of a list that are run at once, as far as they follow one another
                and have one size after resizing. Test-time augmentation goes image by image.

        Raises:
            ConfigError: see :func:`lsnet_d2.config_file.load_config`.
            CheckpointError: the weights are missing or not those of this model.
            ValueError: ``array_format`` or ``batch_size`` is none of those.
        """
        if array_format not in ("BGR", "RGB"):
            raise ValueError(f"array_format is {array_format!r}; it must be BGR or RGB")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        if not isinstance(config, CfgNode):
            config = merge_config(os.fspath(config))
        cfg = config.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = resolve_device(device)
        if weights is not None:
            cfg.MODEL.WEIGHTS = os.fspath(weights)
        self.score_thresh = score_thresh
        if score_thresh is not None:
            model = cfg.MODEL
            for node in (model.LSNET, model.RETINANET, model.FCOS, model.ROI_HEADS):
                node.SCORE_THRESH_TEST = min(node.SCORE_THRESH_TEST, score_thresh)
        register_coco_files(cfg.DATASETS.COCO_FILES)
        check_config(cfg, need_data_sets=False)
        self.cfg = cfg
        self.array_format = array_format
        self.batch_size = batch_size
        with reporting_config_errors(cfg):
            self.model = build_model(cfg).eval()
        checkpoint = LSNetCheckpointer(self.model, cfg=cfg).load(
            cfg.MODEL.WEIGHTS, checkpointables=[], strict=True
        )
        described = described_metadata(checkpoint, cfg.MODEL.WEIGHTS)
        self.metadata = _metadata(cfg.DATASETS.TEST, described)
        if cfg.TEST.AUG.ENABLED:
            self.model = LSNetWithTTA(cfg, self.model)
            cfg = keep_image_sizes(cfg)
        self._augmentation = T.AugmentationList(build_augmentation(cfg, is_train=False))

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Results | list[Results]:
        """
        Args:
            images: one image or a list: files, of all kinds that PIL reads; PIL's images; arrays
                (height, width, channels) or (height, width), uint8 or uint16. Transparency is
                dropped, and of 16 bits the lower 8. Files and PIL's images are turned as their
                EXIF data say.

        Returns:
            Detections, best first, on the CPU, in pixels of the image; for a list, a list of them.
            They are Detectron2's ``Instances``, with more methods.

        Raises:
            ImageError: an image cannot be read, has pixels of another kind, or is so narrow that
                resizing leaves nothing of it.
            TypeError: an image is none of those.
        """
        if isinstance(images, (list, tuple)):
            return list(self._predict(images))
        return next(self._predict([images]))

    @torch.no_grad()
    def _predict(self, images: Sequence[ImageLike]) -> Iterator[Results]:
        inputs = (self._read(image, number) for number, image in enumerate(images))
        batches = batches_of_one_size(inputs, self.batch_size)
        outputs = (output for batch in batches for output in self.model(batch))
        for image, output in zip(images, outputs, strict=True):
            instances = output["instances"].to("cpu")
            if self.score_thresh is not None:
                instances = instances[instances.scores >= self.score_thresh]
            yield Results(
                instances,
                metadata=self.metadata,
                file_name=image if isinstance(image, (str, os.PathLike)) else None,
                array_format=self.array_format,
            )

    def _read(self, image: ImageLike, number: int) -> dict:
        """What the model takes. ``number`` is that of the image in its list."""
        if isinstance(image, (str, os.PathLike)):
            name = os.fspath(image)
        else:  # PIL's images of files know their names
            name = getattr(image, "filename", "") or f"image {number}"
        pixels = load_image(image, self.cfg.INPUT.FORMAT, array_format=self.array_format, name=name)
        height, width = pixels.shape[:2]
        resized = self.resize(pixels, name)
        return {"image": resized, "height": height, "width": width, "file_name": name}

    def resize(self, pixels: np.ndarray, name: str) -> torch.Tensor:
        """An image (H, W, 3) with the channels of ``INPUT.FORMAT`` as the model takes it:
        (3, H', W'), in the size of evaluation.

        Args:
            name: for messages.

        Raises:
            ImageError: the image is too narrow for it.
        """
        resized = NamedAugInput(pixels, name)
        self._augmentation(resized)
        return torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))


def _metadata(test_sets: Sequence[str], described: dict[str, Any]) -> Metadata | None:
    if test_sets:
        return load_metadata(test_sets[0], described)
    return Metadata(**described) if described else None
