import pytest
import tiny_coco
import torch

from lsnet_d2.config_file import load_config, num_classes, resolve_device
from lsnet_d2.engine import LSNetTrainer
from lsnet_d2.errors import ConfigError


def test_device_is_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="'cuda', but there is none"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match="MODEL.DEVICE is 'gpu'"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match="'cuda:2', but there are 2 GPUs"):
        resolve_device("cuda:2")


def test_config_errors_name_key_and_file(tmp_path):
    def load(text, *opts):
        path = tmp_path / "some.yaml"
        path.write_text(text)
        return load_config(str(path), list(opts))

    with pytest.raises(ConfigError, match=r"some.yaml.*MODEL.LSNET.TAKS; did you.*LSNET.TASK"):
        load("MODEL: {LSNET: {TAKS: bbox}}\nVERSION: 2")
    with pytest.raises(ConfigError, match=r"some.yaml.*SOLVER.MAX_ITER"):
        load("SOLVER: {MAX_ITER: many}\nVERSION: 2")
    with pytest.raises(ConfigError, match=r"some.yaml: not a plain YAML"):
        load("SOLVER: {MAX_ITER: ")
    with pytest.raises(ConfigError, match=r"some.yaml: cannot read .*missing.yaml"):
        load("_BASE_: missing.yaml")
    with pytest.raises(ConfigError, match="no such config file: absent.yaml"):
        load_config("absent.yaml")
    with pytest.raises(ConfigError, match="SOLVER.BASELR; did you mean SOLVER.BASE_LR"):
        load("VERSION: 2", "SOLVER.BASELR", "1")
    with pytest.raises(ConfigError, match="pairs"):
        load("VERSION: 2", "SOLVER.BASE_LR=1")
    with pytest.raises(ConfigError, match="--eval-only must stand before"):
        load("VERSION: 2", "SOLVER.BASE_LR", "1", "--eval-only")
    with pytest.raises(ConfigError, match="TEST: data set 'coco_2017_vall' .*2017_val.*no folder"):
        load("VERSION: 2", "DATASETS.TEST", "('coco_2017_vall',)")
    with pytest.raises(ConfigError, match="CLIP_TYPE is 'all'; .*full_model"):
        load("SOLVER: {CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: all}}\nVERSION: 2")
    with pytest.raises(ConfigError, match="MODEL.LSNET.TASK is 'boxes'"):
        load("MODEL: {META_ARCHITECTURE: LSNet, LSNET: {TASK: boxes}}\nVERSION: 2")
    with pytest.raises(ConfigError, match="META_ARCHITECTURE is 'LSNett'.*LSNet"):
        load("MODEL: {META_ARCHITECTURE: LSNett}\nVERSION: 2")


LSNET, RESNET, LITE = (
    {"MODEL.META_ARCHITECTURE": "LSNet", "MODEL.BACKBONE.NAME": name, "MODEL.DEVICE": "cpu"}
    for name in (
        "build_lsnet_resnet_fpn_backbone",
        "build_resnet_backbone",
        "build_lsnet_efficientnet_lite0_fpn_backbone",
    )
)
AUGMENTED = {**LSNET, "TEST.AUG.ENABLED": "True"}


def options(settings):
    return [str(item) for pair in settings.items() for item in pair]


@pytest.mark.parametrize(
    ("base", "key", "value", "message"),
    [
        (LSNET, "MODEL.LSNET.TOWER_CONV", "dcnn", "'dcnn'; .*dcn, conv"),
        (LSNET, "MODEL.LSNET.IN_FEATURES", "['p3', 'p4']", "3 or more"),
        (
            {"MODEL.META_ARCHITECTURE": "RetinaNet"},
            "TEST.AUG.ENABLED",
            "True",
            "RetinaNet; only LSNet",
        ),
        (AUGMENTED, "TEST.AUG.MIN_SIZES", "()", "one or more"),
        (AUGMENTED, "TEST.AUG.METHOD", "mean", "vote, nms"),
        (AUGMENTED, "TEST.AUG.VOTE_IOU", "0.0", "over 0"),
        (AUGMENTED, "TEST.AUG.DETECTIONS_PER_IMAGE", "-1", "must not be negative"),
        (LSNET, "MODEL.LSNET.NUM_CLASSES", "0", "1 or more"),
        (LSNET, "MODEL.LSNET.SOFT_NMS_SIGMA_TEST", "-1.0", "must not be negative"),
        (LSNET, "TEST.DETECTIONS_PER_IMAGE", "-1", "1 or more"),
        (LSNET, "MODEL.BACKBONE.NAME", "build_lsnet_fpn_backbone", "did you mean .*build_lsnet"),
        (RESNET, "MODEL.BACKBONE.FREEZE_AT", "99", "0 to 5"),
        (RESNET, "SOLVER.IMS_PER_BATCH", "0", "1 or more"),
        (RESNET, "SOLVER.REFERENCE_IMS_PER_BATCH", "-1", "0 for no scaling"),
        (RESNET, "SOLVER.MAX_ITER", "0", "1 or more"),
        (RESNET, "SOLVER.CHECKPOINT_PERIOD", "0", "1 or more"),
        (RESNET, "SOLVER.LR_SCHEDULER_NAME", "Nope", "WarmupCosineLR"),
        (RESNET, "INPUT.FORMAT", "XYZ", "RGB, BGR"),
        (RESNET, "INPUT.RANDOM_FLIP", "sideways", "horizontal, vertical, none"),
    ],
)
def test_values_that_nothing_can_be_made_of(base, key, value, message):
    with pytest.raises(ConfigError, match=f"{key} is .*{message}"):
        load_config("", options({**base, key: value}))


def test_size_ranges_belong_to_the_sizes():
    ranges = {"TEST.AUG.MIN_SIZES": "(400, 800)", "TEST.AUG.SIZE_RANGES": "((0, 96),)"}
    with pytest.raises(ConfigError, match="^TEST.AUG.SIZE_RANGES has 1 ranges; .* 2 TEST.AUG.MIN"):
        load_config("", options({**AUGMENTED, **ranges}))
    ranges["TEST.AUG.SIZE_RANGES"] = "((0, 96), [96, 10000.5])"
    assert len(load_config("", options({**AUGMENTED, **ranges})).TEST.AUG.SIZE_RANGES) == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.LSNET.IN_FEATURES", "['p3', 'p4', 'p9']", r"IN_FEATURES names \['p9'\]"),
        ("MODEL.FPN.OUT_CHANNELS", "48", "MODEL.FPN.OUT_CHANNELS.*got 48"),
        ("MODEL.BACKBONE.FREEZE_AT", "99", "MODEL.BACKBONE.FREEZE_AT is 99"),
        ("MODEL.EFFICIENTNET.NORM", "GN", "MODEL.EFFICIENTNET.NORM is 'GN'"),
    ],
)
def test_values_that_the_builders_refuse(key, value, message):
    fpn = {"MODEL.FPN.IN_FEATURES": "['stride8', 'stride16', 'stride32']"}
    cfg = load_config("", options({**LITE, **fpn, key: value}))
    with pytest.raises(ConfigError, match=message):
        LSNetTrainer.build_model(cfg)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir ['{}']",
        "!!python/object/new:os.mkdir ['{}']",
        "!!python/object/apply:eval [\"__import__('os').mkdir('{}')\"]",
    ],
)
@pytest.mark.parametrize("through_base", [False, True])
def test_config_file_is_data(tmp_path, tag, through_base):
    target = tmp_path / "executed"
    (tmp_path / "evil.yaml").write_text(f"OUTPUT_DIR: {tag.format(target)}\nVERSION: 2")
    (tmp_path / "base.yaml").write_text("_BASE_: [evil.yaml]")
    (tmp_path / "top.yaml").write_text("_BASE_: base.yaml")
    path = tmp_path / ("top.yaml" if through_base else "evil.yaml")
    with pytest.raises(ConfigError, match=rf"{path.name}: not a plain YAML .*python"):
        load_config(str(path))
    assert not target.exists()


def test_options_are_data(tmp_path):
    target = tmp_path / "executed"
    load_config("", ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", f"__import__('os').mkdir('{target}')"])
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_BASE_: https://example.com/a.yaml", "a file here, not 'https://example.com/a.yaml'"),
        ("_BASE_: [detectron2://a.yaml]", "a file here, not 'detectron2://a.yaml'"),
        ("_BASE_: 3", "a file here, not 3"),
        ("_BASE_: one.yaml", "leads back"),
        ("_BASE_: two.yaml", "two.yaml: _BASE_ one.yaml leads back"),
        ("- 1", "not a config"),
        ("", "not a config"),
    ],
)
def test_bases_are_files_here(tmp_path, monkeypatch, text, message):
    def fetch(*_, **__):
        raise AssertionError("fetched")

    monkeypatch.setattr("urllib.request.urlopen", fetch)
    (tmp_path / "one.yaml").write_text(text)
    (tmp_path / "two.yaml").write_text("_BASE_: one.yaml")
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / "one.yaml"))


def test_number_of_classes_by_architecture(tmp_path):
    cfg = tiny_coco.load_tiny_config(tmp_path, "MODEL.RETINANET.NUM_CLASSES", "7")
    assert num_classes(cfg) == 7
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.LSNET.NUM_CLASSES = "LSNet", 5
    assert num_classes(cfg) == 5
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NUM_CLASSES = "GeneralizedRCNN", 3
    assert num_classes(cfg) == 3
