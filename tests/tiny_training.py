"""Trainings of a few iterations, on a few images of both orientations."""

import json

import numpy as np
import tiny_coco
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from PIL import Image

from lsnet_d2.config_file import load_config
from lsnet_d2.engine import LSNetTrainer

ITERATIONS, PERIOD = 7, 3
COUNT = 7  # images, every third of them higher than wide


def write_data(folder):
    """Images of both orientations, with something to see in them."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    images, annotations = [], []
    for number in range(1, COUNT + 1):
        height, width = (64, 48) if number % 3 == 0 else (48, 64)
        name = f"{number}.png"
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        x, y, w, h = 4 + 2 * number, 6 + number, 20, 24
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1 + number % 2,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
        )
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "data.json").write_text(json.dumps(data))
    return folder


def make_cfg(folder, output, *opts, architecture="LSNet", **settings):
    settings = {
        "MODEL.DEVICE": "cpu",
        "OUTPUT_DIR": str(output),
        "DATASETS.COCO_FILES": f"[['stream', '{folder}/data.json', '{folder}/images']]",
        "DATASETS.TRAIN": "('stream',)",
        "DATASETS.TEST": "('stream',)",
        "TEST.EVAL_PERIOD": 4,
        "TEST.VALIDATION_LOSS": True,
        "INPUT.MIN_SIZE_TRAIN": "(40, 48, 56, 64)",
        "MODEL.LSNET.NUM_CLASSES": 2,
        "MODEL.RETINANET.NUM_CLASSES": 2,
        "MODEL.LSNET.POLISH_IN_FEATURES": "('p3', 'p4')",
        "MODEL.LSNET.POLISH_POSITIVES": 2,
        "SOLVER.BASE_LR": 0.02,
        "SOLVER.EMA.ENABLED": True,
        "SOLVER.MAX_ITER": ITERATIONS,
        "SOLVER.CHECKPOINT_PERIOD": PERIOD,
        **settings,
    }
    path = tiny_coco.write_config(folder, architecture)
    return load_config(str(path), [*map(str, sum(settings.items(), ())), *opts])


class At(HookBase):
    """Does something before an iteration."""

    def __init__(self, iteration, action):
        self.iteration, self.action = iteration, action

    def before_step(self):
        if self.trainer.iter == self.iteration:
            self.action()


def train(cfg, *hooks, resume=False):
    """As tools/train_net.py does it."""
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    trainer = LSNetTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks(list(hooks))
    trainer.train()
    return trainer
