"""COCO's average precision in a fraction of the time.

Matching and accumulating are hotcoco's, a library in Rust whose figures are pycocotools' to the
last bit (``tests/test_fast_coco.py``); the summary is pycocotools' own.

hotcoco wants the types of COCO's own files, also of keys that no figure depends on. So it is given
what matching uses alone, with ids counted from 1.
"""

from typing import Any

import hotcoco
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO

# What of an annotation matching looks at for each task.
_MATCHED = {
    "bbox": ("iscrowd", "area", "bbox"),
    "segm": ("iscrowd", "area", "bbox", "segmentation"),
    "keypoints": ("iscrowd", "area", "bbox", "keypoints", "num_keypoints"),
}


class FastCOCOeval(COCOevalMaxDets):
    """Detectron2's :class:`COCOevalMaxDets` as far as figures go: ``params``, ``eval`` and
    ``stats``. It has no ``evalImgs`` and ``ious``.

    Args:
        ground_truth: indexed, with what :func:`~lsnet_d2.ground_truth.complete_annotations` adds;
            it is not written into.
        results: as in COCO's results file, with the keys of the task.
        task: "bbox", "segm" or "keypoints".
    """

    def __init__(self, ground_truth: COCO, results: list[dict[str, Any]], task: str) -> None:
        super().__init__(ground_truth, None, task)
        self._results = results

    def evaluate(self) -> None:
        """Match detections and objects, for all images of ``params.imgIds``.

        Raises:
            ValueError: a result is of an image that the data set does not have.
        """
        unknown = {result["image_id"] for result in self._results} - self.cocoGt.imgs.keys()
        if unknown:
            raise ValueError(f"results of image {min(unknown)}, which is not in the data set")
        self.params.maxDets = sorted(self.params.maxDets)
        # in the order of the ids, in which pycocotools goes through them
        images = {image: n for n, image in enumerate(sorted(self.cocoGt.imgs), start=1)}
        categories = {category: n for n, category in enumerate(sorted(self.cocoGt.cats), start=1)}
        keys = ("image_id", "category_id", *_MATCHED[self.params.iouType])
        annotations = [{key: a[key] for key in keys} for a in self.cocoGt.dataset["annotations"]]
        annotations = _renumbered(annotations, images, categories)
        true = hotcoco.COCO(
            {
                "images": [
                    {"id": images[i], "height": int(image["height"]), "width": int(image["width"])}
                    for i, image in self.cocoGt.imgs.items()
                ],
                "categories": [{"id": n, "name": str(n)} for n in categories.values()],
                "annotations": [{**a, "id": n} for n, a in enumerate(annotations, start=1)],
            }
        )
        found = true.load_res(_renumbered(self._results, images, categories))
        self._matching = hotcoco.COCOeval(true, found, self.params.iouType)
        params = self._matching.params
        params.imgIds = sorted({images[image] for image in self.params.imgIds})
        params.catIds = sorted({categories[category] for category in self.params.catIds})
        for name in ("iouThrs", "recThrs", "maxDets", "areaRng", "areaRngLbl"):
            value = getattr(self.params, name)
            setattr(params, name, value.tolist() if hasattr(value, "tolist") else list(value))
        params.useCats = bool(self.params.useCats)
        if self.params.iouType == "keypoints":
            params.kpt_oks_sigmas = self.params.kpt_oks_sigmas.tolist()
        self._matching.evaluate()

    def accumulate(self) -> None:
        """Precision and recall by threshold, class, size and number of detections."""
        self._matching.accumulate()
        self.eval = {**self._matching.eval, "params": self.params}


def _renumbered(entries: list[dict], images: dict, categories: dict) -> list[dict]:
    """Annotations or results under other ids; without those of unknown images and classes."""
    return [
        entry | {"image_id": images[image], "category_id": categories[category]}
        for entry in entries
        if (image := entry["image_id"]) in images
        and (category := entry["category_id"]) in categories
    ]
