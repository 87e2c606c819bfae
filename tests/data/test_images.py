import numpy as np
import pytest
from PIL import Image

from lsnet_d2.data.images import ImageError, read_image

GRADIENT = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def test_colours_come_in_the_order_asked_for(tmp_path):
    pixels = np.stack([GRADIENT, GRADIENT // 2, GRADIENT // 4], axis=-1)
    file = save(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(read_image(file, "RGB"), pixels)
    np.testing.assert_array_equal(read_image(file, "BGR"), pixels[:, :, ::-1])


def test_grey_and_transparent(tmp_path):
    grey = read_image(save(tmp_path / "grey.png", GRADIENT), "BGR")
    np.testing.assert_array_equal(grey, np.repeat(GRADIENT[:, :, None], 3, axis=2))
    rgba = np.stack([GRADIENT, GRADIENT // 2, GRADIENT // 4, GRADIENT], axis=-1)
    seen = read_image(save(tmp_path / "rgba.png", rgba), "RGB")
    np.testing.assert_array_equal(seen, rgba[:, :, :3])


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    deep = GRADIENT.astype(np.uint16) * 257
    seen = read_image(save(tmp_path / "deep.png", deep), "BGR")
    np.testing.assert_array_equal(seen[:, :, 1], GRADIENT)
    assert seen.dtype == np.uint8


def test_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = save(tmp_path / "turned.png", np.repeat(GRADIENT[..., None], 3, axis=2), exif=exif)
    np.testing.assert_array_equal(read_image(file, "RGB")[:, :, 0], np.rot90(GRADIENT, -1))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated(tmp_path, suffix):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    file = save(tmp_path / f"half.{suffix}", noise)
    data = (tmp_path / f"half.{suffix}").read_bytes()
    (tmp_path / f"half.{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=f"half.{suffix}: not a complete image file"):
        read_image(file, "BGR")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_no_image(tmp_path, content):
    (tmp_path / "text.png").write_bytes(content)
    with pytest.raises(ImageError, match="text.png: not a complete image file"):
        read_image(str(tmp_path / "text.png"), "BGR")


def test_missing(tmp_path):
    with pytest.raises(ImageError, match="gone.png: no such image file"):
        read_image(str(tmp_path / "gone.png"), "BGR")


def test_pixels_that_do_not_fit(tmp_path):
    real = save(tmp_path / "real.tiff", GRADIENT.astype(np.float32))
    with pytest.raises(ImageError, match="real.tiff: pixels are real numbers"):
        read_image(real, "BGR")
    wide = save(tmp_path / "wide.tiff", GRADIENT.astype(np.int32) * 1000)
    with pytest.raises(ImageError, match="wide.tiff: more than 16 bits"):
        read_image(wide, "BGR")
