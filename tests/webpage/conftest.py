import pytest
import tiny_coco
from own_data import write_own_data

from lsnet_d2 import LSNetPredictor
from lsnet_d2.checkpointer import LSNetCheckpointer
from lsnet_d2.config_file import load_config


@pytest.fixture(scope="package")
def birds(tmp_path_factory):
    """A folder with three images, a config and the weights of a model that finds much in them."""
    folder = tmp_path_factory.mktemp("birds")
    annotations, images = write_own_data(folder, "val", 3)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.LSNET.TASK", "joint", "MODEL.LSNET.NUM_CLASSES", "3"]
    opts += ["MODEL.LSNET.BRANCHES", "['extreme', 'contour', 'keypoint']"]
    opts += ["MODEL.LSNET.NUM_KEYPOINTS", "5", "MODEL.LSNET.PRIOR_PROB", "0.3"]
    opts += ["DATASETS.COCO_FILES", f"[['web_birds_val', '{annotations}', '{images}']]"]
    opts += ["DATASETS.TEST", "('web_birds_val',)", "INPUT.MIN_SIZE_TEST", "96"]
    cfg = load_config(str(tiny_coco.write_config(folder, "LSNet")), opts)
    model = tiny_coco.make_finding_model(cfg, seed=2)
    LSNetCheckpointer(model, str(folder)).save("weights")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture(scope="package")
def predictor(birds):
    return LSNetPredictor(birds / "config.yaml", weights=birds / "weights.pth", device="cpu")
