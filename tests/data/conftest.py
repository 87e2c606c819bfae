import numpy as np
import pytest
from mapping import HEIGHT, WIDTH
from PIL import Image


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "image.png"
    pixels = np.arange(HEIGHT * WIDTH * 3) % 251
    Image.fromarray(pixels.reshape(HEIGHT, WIDTH, 3).astype(np.uint8)).save(path)
    return str(path)
