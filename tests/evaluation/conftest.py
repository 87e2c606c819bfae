import pytest
import tiny_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances


@pytest.fixture
def coco(tmp_path):
    """The folder of the small data set, whose images to test on are registered as tiny_eval."""
    tiny_coco.write_coco(tmp_path)
    register_coco_instances(
        "tiny_eval",
        {},
        str(tiny_coco.json_file(tmp_path, "val")),
        str(tmp_path / "coco" / "val2017"),
    )
    yield tmp_path
    DatasetCatalog.remove("tiny_eval")
    MetadataCatalog.remove("tiny_eval")
