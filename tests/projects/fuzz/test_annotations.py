import json

from fuzz_project import annotations, images
from PIL import Image


def test_sound_annotations_are_handled(tmp_path):
    """What is refused is refused for its damage."""
    (tmp_path / "images").mkdir()
    for name in ("1.png", "2.png"):
        Image.new("RGB", images.SIZE[::-1]).save(tmp_path / "images" / name)
    (tmp_path / "fuzzed.json").write_text(json.dumps(annotations.sound_annotations()))
    for number in range(4):
        annotations.read_annotations(tmp_path, number)
        annotations.report_annotations(tmp_path, number)
