import io

import detectron2.data.transforms as T
import numpy as np
import pytest
from PIL import Image, ImageOps

from lsnet_d2.data.images import (
    ImageError,
    NamedAugInput,
    convert_image,
    load_image,
    open_image,
    read_image,
    read_image_size,
)

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


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
@pytest.mark.parametrize("orientation", range(10))
def test_sizes_are_those_of_what_is_read(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(tmp_path / f"a.{suffix}", GRADIENT, exif=exif)
    assert read_image_size(file) == read_image(file, "RGB").shape[:2]
    with pytest.raises(ImageError, match="gone.png: no such image file"):
        read_image_size(str(tmp_path / "gone.png"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(tmp_path / "a.png", GRADIENT, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    np.testing.assert_array_equal(read_image(file, "RGB")[:, :, 0], expected)
    np.testing.assert_array_equal(convert_image(Image.open(file), "RGB")[:, :, 0], expected)


@pytest.mark.parametrize("exif", [b"Exif\0\0" + bytes(8), b"Exif\0\0MM\0*"])
def test_a_broken_block_of_exif_turns_nothing(tmp_path, exif):
    file = save(tmp_path / "a.jpg", GRADIENT, exif=exif, dpi=(72, 72))
    assert exif in (tmp_path / "a.jpg").read_bytes()
    assert read_image(file, "RGB").shape == (12, 20, 3)
    assert read_image_size(file) == (12, 20)
    assert convert_image(Image.open(file), "RGB").shape == (12, 20, 3)


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


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="large.png: too large: Image size .240 pixels. exceeds"):
        read_image(save(tmp_path / "large.png", GRADIENT), "BGR")


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


COLOURS = np.stack([GRADIENT, GRADIENT // 2, GRADIENT // 4, 255 - GRADIENT], axis=-1)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("array_format", ["RGB", "BGR"])
@pytest.mark.parametrize("channels", [3, 4])
def test_arrays_are_what_files_of_them_are(tmp_path, image_format, array_format, channels):
    expected = read_image(save(tmp_path / "a.png", COLOURS[:, :, :channels]), image_format)
    for depth in (np.uint8, np.uint16):
        pixels = COLOURS[:, :, :channels].astype(depth) * (257 if depth == np.uint16 else 1)
        if array_format == "BGR":
            pixels = pixels[:, :, [2, 1, 0, 3][:channels]]
        seen = convert_image(pixels, image_format, array_format=array_format)
        np.testing.assert_array_equal(seen, expected)


def test_grey_arrays():
    expected = np.repeat(GRADIENT[:, :, None], 3, axis=2)
    for pixels in (GRADIENT, GRADIENT[:, :, None], GRADIENT.astype(np.uint16) * 257):
        np.testing.assert_array_equal(convert_image(pixels, "BGR"), expected)
    assert convert_image(GRADIENT, "L").shape == (12, 20, 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_images_of_pil_are_what_files_of_them_are(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(COLOURS[:, :, :3]).convert(mode)
    image.getexif()[0x0112] = 6  # turned
    file = tmp_path / "a.tiff"
    image.save(file, exif=image.getexif())
    seen = convert_image(image, "RGB")
    assert seen.shape == (20, 12, 3)
    np.testing.assert_array_equal(seen, read_image(str(file), "RGB"))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 5, 2), np.uint8), r"shape \(4, 5, 2\); it must be"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"shape \(1, 4, 5, 3\); it must be"),
        (np.zeros(4, np.uint8), r"shape \(4,\); it must be"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\); it must be"),
        (np.zeros((4, 5, 3)), "float64; it must be uint8 or uint16"),
        (np.zeros((4, 5), np.int64), "int64; it must be uint8 or uint16"),
        (Image.new("F", (5, 4)), "real numbers"),
        (Image.new("I", (5, 4), 1 << 20), "more than 16 bits"),
    ],
)
def test_images_in_memory_that_are_refused(pixels, message):
    with pytest.raises(ImageError, match=f"^frame 7: .*{message}"):
        convert_image(pixels, "BGR", name="frame 7")


def test_files_that_are_in_memory():
    file = io.BytesIO()
    Image.fromarray(GRADIENT).save(file, "PNG")
    with open_image(file, "frame.png") as image:
        assert (image.filename, image.size) == ("frame.png", (20, 12))
        np.testing.assert_array_equal(convert_image(image, "RGB")[:, :, 0], GRADIENT)
    for data in (b"", b"no image", file.getvalue()):
        with pytest.raises(ImageError, match="^frame 7: not a complete image file: it begins like"):
            open_image(io.BytesIO(data), "frame 7", formats=["JPEG"])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_file_that_pil_has_opened(tmp_path, suffix):
    """It reads the pixels only when they are asked for."""
    file = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-600])
    with (
        Image.open(file) as image,
        pytest.raises(ImageError, match="^frame 7: not a complete image: "),
    ):
        convert_image(image, "BGR", name="frame 7")


def test_files_and_images_in_memory(tmp_path):
    pixels = COLOURS[:, :, :3]
    file = save(tmp_path / "a.png", pixels)
    for image in (file, tmp_path / "a.png", Image.fromarray(pixels), pixels):
        np.testing.assert_array_equal(load_image(image, "RGB", array_format="RGB"), pixels)
    with pytest.raises(TypeError, match="^frame 7 is of type bytes; it must be a path"):
        load_image(b"", "RGB", name="frame 7")


@pytest.mark.parametrize(
    ("size", "message"), [((1, 5000), "5000 x 1 .* 1333 x 0"), ((5000, 1), "1 x 5000 .* 0 x 1333")]
)
def test_images_of_which_resizing_leaves_nothing(size, message):
    image = NamedAugInput(np.zeros((*size, 3), np.uint8), "strip.png")
    with pytest.raises(ImageError, match=f"^strip.png: too narrow to be resized: .*{message}"):
        T.ResizeShortestEdge(800, 1333)(image)


def test_narrow_images_are_resized():
    image = NamedAugInput(np.zeros((2, 5000, 3), np.uint8), "strip.png")
    T.AugmentationList([T.ResizeShortestEdge(800, 1333), T.RandomFlip(prob=1)])(image)
    assert image.image.shape == (1, 1333, 3)
