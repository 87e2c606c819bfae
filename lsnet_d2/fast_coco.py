"""COCO's average precision in a fraction of the time.

Matching and accumulating are hotcoco's, a library in Rust whose figures are pycocotools' to the
last bit (``tests/test_fast_coco.py``); the summary is pycocotools' own.
"""

from typing import Any

import hotcoco
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO


class FastCOCOeval(COCOevalMaxDets):
    """Detectron2's :class:`COCOevalMaxDets` as far as figures go: ``params``, ``eval`` and
    ``stats``. It has no ``evalImgs`` and ``ious``.

    Args:
        ground_truth: indexed; it is not written into.
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
        true = hotcoco.COCO(self.cocoGt.dataset)
        self._matching = hotcoco.COCOeval(true, true.load_res(self._results), self.params.iouType)
        params = self._matching.params
        for name in ("imgIds", "catIds", "iouThrs", "recThrs", "maxDets", "areaRng", "areaRngLbl"):
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
