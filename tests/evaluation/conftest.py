import pytest
import tiny_coco


@pytest.fixture
def coco(tmp_path):
    with tiny_coco.registered(tmp_path, "RetinaNet"):
        yield tmp_path
