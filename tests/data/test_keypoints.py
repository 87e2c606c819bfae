import pytest
from detectron2.data import MetadataCatalog

from lsnet_d2.data.keypoints import keypoint_flip_indices, skeleton_metadata
from lsnet_d2.errors import ConfigError

HAND = {
    "name": "hand",
    "keypoints": ["wrist", "left_tip", "right_tip"],
    "skeleton": [[1, 2], [1, 3]],
}


@pytest.fixture
def register():
    names = []

    def make(name, **metadata):
        names.append(name)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield make
    for name in names:
        MetadataCatalog.remove(name)


def test_skeleton_of_a_category():
    metadata = skeleton_metadata([{"name": "cup"}, HAND])
    assert metadata["keypoint_names"] == HAND["keypoints"]
    assert metadata["keypoint_flip_map"] == [("left_tip", "right_tip")]
    bones = [rule[:2] for rule in metadata["keypoint_connection_rules"]]
    assert bones == [("wrist", "left_tip"), ("wrist", "right_tip")]


def test_no_skeleton():
    assert skeleton_metadata([{"name": "cup", "keypoints": []}]) == {}


def test_coco_people_have_detectron2s_skeleton():
    names = MetadataCatalog.get("keypoints_coco_2017_val").keypoint_names
    metadata = skeleton_metadata([{"name": "person", "keypoints": list(names), "skeleton": []}])
    assert metadata["keypoint_flip_map"] == list(
        MetadataCatalog.get("keypoints_coco_2017_val").keypoint_flip_map
    )
    assert len(metadata["keypoint_connection_rules"]) > 10


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([HAND, {"name": "foot", "keypoints": ["heel"]}], "'foot' has other keypoints than 'hand'"),
        ([{"name": "a", "keypoints": ["x", "x"]}], "'a' has two keypoints of the same name"),
        ([{**HAND, "skeleton": [[0, 1]]}], "'hand' has a bone to a keypoint"),
        ([{**HAND, "skeleton": [[1, 2, 3]]}], "'hand' has a bone to a keypoint"),
        ([{**HAND, "skeleton": [["wrist", "left_tip"]]}], "'hand' has a bone to a keypoint"),
        ([{**HAND, "keypoints": 3}], "the keypoints of category 'hand' are not a list of names"),
        ([{**HAND, "keypoints": [1, 2, 3]}], "the keypoints of category 'hand' are not a list"),
    ],
)
def test_bad_skeletons_name_the_category(categories, message):
    with pytest.raises(ValueError, match=message):
        skeleton_metadata(categories)


def test_flip_indices(register):
    one = register("hands_one", **skeleton_metadata([HAND]))
    two = register("hands_two", **skeleton_metadata([HAND]))
    without = register("cups_only")
    assert keypoint_flip_indices([one, without, two], 3) == [0, 2, 1]


def test_left_and_right_are_pairs_in_capitals_too():
    names = ["Left eye", "RIGHT_EAR", "nose", "Right eye", "LEFT_EAR"]
    pairs = skeleton_metadata([{"name": "face", "keypoints": names}])["keypoint_flip_map"]
    assert pairs == [("Left eye", "Right eye"), ("LEFT_EAR", "RIGHT_EAR")]
    names = ["left_a", "Left_a", "right_a", "Right_a"]
    pairs = skeleton_metadata([{"name": "face", "keypoints": names}])["keypoint_flip_map"]
    assert pairs == [("left_a", "right_a")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["left_eye", "right_eye", "nose"], None),
        (["nose"], None),
        (["left_eye", "right_eye", "Left ear", "ear_right"], "keypoints Left ear, ear_right have"),
        (["cleft", "upright", "tail"], None),
    ],
)
def test_keypoints_that_mirroring_does_not_exchange_are_named(register, caplog, names, message):
    data_set = register("faces", **skeleton_metadata([{"name": "face", "keypoints": names}]))
    keypoint_flip_indices([data_set], len(names))
    assert message in caplog.text if message else not caplog.text


def test_flip_indices_need_one_skeleton_of_the_right_size(register):
    hands = register("hands", **skeleton_metadata([HAND]))
    feet = register("feet", **skeleton_metadata([{"name": "foot", "keypoints": ["heel"]}]))
    none = register("cups")
    with pytest.raises(ConfigError, match="hands and feet have different keypoints"):
        keypoint_flip_indices([hands, feet], 3)
    with pytest.raises(ConfigError, match="hands has 3 keypoints: set MODEL.LSNET.NUM_KEYPOINTS 3"):
        keypoint_flip_indices([hands], 17)
    with pytest.raises(ConfigError, match="cups have no keypoint_names"):
        keypoint_flip_indices([none], 17)


def test_pairs_and_tolerances_of_the_file():
    hand = {
        **HAND,
        "keypoint_flip_map": [["wrist", "right_tip"]],
        "keypoint_oks_sigmas": [0.1, 0.2, 0.3],
    }
    metadata = skeleton_metadata([hand])
    assert metadata["keypoint_flip_map"] == [("wrist", "right_tip")]
    assert metadata["keypoint_oks_sigmas"] == [0.1, 0.2, 0.3]
    assert skeleton_metadata([{**HAND, "keypoint_flip_map": []}])["keypoint_flip_map"] == []
    assert "keypoint_oks_sigmas" not in skeleton_metadata([HAND])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("keypoint_flip_map", [["left_tip", "thumb"]]),
        ("keypoint_flip_map", [["left_tip", "right_tip"], ["right_tip", "wrist"]]),
        ("keypoint_flip_map", [["left_tip", "right_tip", "wrist"]]),
        ("keypoint_flip_map", [["left_tip", "left_tip"]]),
        ("keypoint_flip_map", 1),
        ("keypoint_flip_map", ["left_tip"]),
        ("keypoint_oks_sigmas", 0.1),
        ("keypoint_oks_sigmas", [0.1, 0.2]),
        ("keypoint_oks_sigmas", [0.1, 0.2, 0]),
        ("keypoint_oks_sigmas", [0.1, 0.2, "0.3"]),
        ("keypoint_oks_sigmas", [0.1, 0.2, float("nan")]),
    ],
)
def test_bad_pairs_and_tolerances_name_the_category(key, value):
    with pytest.raises(ValueError, match=f"the {key} of category 'hand'"):
        skeleton_metadata([{**HAND, key: value}])
