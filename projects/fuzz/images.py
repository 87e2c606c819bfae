"""Image files, sound and damaged, and what reads them."""

import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from lsnet_d2.data.images import encode_image, read_image, read_image_size

SIZE = (40, 56)  # height, width


def sound_image(rng: random.Random) -> bytes:
    """One of the kinds of images there are."""
    height, width = SIZE
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 4))
    image = Image.fromarray(pixels.astype(np.uint8))
    file_format, mode = rng.choice(
        [
            *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
            *(("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
            *(("TIFF", mode) for mode in ("RGB", "I;16", "F", "I", "CMYK", "LAB")),
            *(("BMP", "RGB"), ("BMP", "P"), ("GIF", "P"), ("WEBP", "RGB"), ("PPM", "RGB")),
        ]
    )
    if mode == "I;16":
        image = Image.fromarray((pixels[..., 0] * 256 + pixels[..., 1]).astype(np.uint16))
    elif mode in ("LAB", "LA"):
        image = image.convert("RGB" if mode == "LAB" else "L").convert("RGB").convert("LA")
        image = Image.merge("LAB", [image.getchannel(0)] * 3) if mode == "LAB" else image
    else:
        image = image.convert("RGB").convert(mode)
    options = {}
    if file_format in ("JPEG", "PNG", "WEBP"):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = rng.randrange(10)
        options["exif"] = exif
    if file_format == "JPEG":
        options |= {"progressive": rng.random() < 0.5, "quality": rng.choice([5, 90])}
    return encode_image(image, file_format, **options)


def damage_image(rng: random.Random) -> tuple[str, bytes]:
    """Which kind of damage it is, and the file."""
    content = sound_image(rng)
    place = rng.randrange(len(content))
    kind = rng.choice(["none", "cut short", "bits", "head", "huge", "zeros", "joined", "empty"])
    if kind == "cut short":
        content = content[:place]
    elif kind in ("bits", "head"):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 12)):
            damaged[rng.randrange(min(len(damaged), 64 if kind == "head" else 10**9))] ^= (
                1 << rng.randrange(8)
            )
        content = bytes(damaged)
    elif kind == "huge":
        content = declare_huge(rng, content)
    elif kind == "zeros":
        content = content[:place] + bytes(len(content) - place)
    elif kind == "joined":
        content = content[:place] + sound_image(rng)[rng.randrange(64) :]
    elif kind == "empty":
        content = rng.choice([b"", b"\0", bytes(5000), b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1"])
    return kind, content


def declare_huge(rng: random.Random, content: bytes) -> bytes:
    """A small file that claims to be a large image."""
    side = rng.choice([2**13, 30_000, 65_500, 2**20, 2**31 - 1])
    if content.startswith(b"\x89PNG") or rng.random() < 0.4:
        rows = zlib.compress(bytes(rng.choice([100, 10**6])), 9)
        head = struct.pack(">IIBBBBB", side, rng.choice([1, side]), 8, 0, 0, 0, 0)
        chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
    short = min(side, 65_500)
    for size in (struct.pack(">HH", *SIZE), struct.pack("<HH", *SIZE[::-1])):  # JPEG; GIF
        content = content.replace(size, struct.pack(">HH", short, short), 1)
    for size in (struct.pack("<ii", *SIZE[::-1]),):  # BMP
        content = content.replace(size, struct.pack("<ii", side, side), 1)
    return content.replace(b"56 40", f"{side} {side}".encode(), 1)  # PPM


def read_one_image(folder: Path, number: int) -> None:
    """As the mapper and the checks do."""
    file = str(folder / "fuzzed.img")
    pixels = read_image(file, ("BGR", "RGB")[number % 2])
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise AssertionError(f"an array of {pixels.dtype} and shape {pixels.shape}")
    if read_image_size(file) != pixels.shape[:2]:
        raise AssertionError(f"size {read_image_size(file)}, but pixels {pixels.shape[:2]}")
