"""Colours, textures and backgrounds of the ``shapes`` data set.

Pictures are float32 RGB with values from 0 to 255, until :func:`finish` turns them into uint8.
"""

import cv2
import numpy as np


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise of about unit variance, (height, width, 3) float32."""
    grid = rng.standard_normal((cells + 1, cells + 1, 3)).astype(np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise of several octaves, a gradient, and blobs and lines to be taken for objects; float32,
    (size, size, 3)."""
    mean = rng.uniform(60, 200) + rng.normal(0, 22, 3)
    canvas = np.full((size, size, 3), mean, np.float32)
    strength = rng.uniform(9, 26)
    colourful = rng.uniform(0.05, 0.7)
    for cells in (2, 4, 9, 20, 45, 80):
        noise = smooth_noise(rng, size, size, cells)
        grey = noise[..., :1]
        canvas += strength * (grey + colourful * (noise - grey))
        strength *= rng.uniform(0.5, 0.85)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    slope = rng.normal(0, 14, (2, 3)).astype(np.float32)
    canvas += ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]

    for _ in range(rng.integers(0, 5)):
        blob = np.zeros((size, size), np.float32)
        axes = np.round(rng.uniform(0.03, 0.2, 2) * size).astype(int) + 1
        centre = rng.integers(0, size, 2)
        angle = float(rng.uniform(0, 180))
        cv2.ellipse(blob, centre.tolist(), axes.tolist(), angle, 0, 360, 1.0, -1)
        blob = cv2.GaussianBlur(blob, (0, 0), float(rng.uniform(2.0, 6.0)))
        canvas += blob[..., None] * rng.normal(0, 30, 3).astype(np.float32)
    for _ in range(rng.integers(0, 6)):
        start, end = rng.uniform(-0.2, 1.2, (2, 2)) * size
        colour = canvas[rng.integers(size), rng.integers(size)] + rng.normal(0, 35, 3)
        ends = [np.round(point * 16).astype(int).tolist() for point in (start, end)]
        line = np.zeros((size, size), np.uint8)  # OpenCV smooths the edges of 8-bit drawings only
        cv2.line(line, *ends, 255, int(rng.integers(1, 4)), cv2.LINE_AA, shift=4)
        canvas += (line[..., None] / np.float32(255)) * (colour.astype(np.float32) - canvas)
    return np.clip(canvas, 0, 255)


def draw_texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Factor near 1 for the colours of an object, (height, width) float32."""
    kind = rng.integers(0, 4)
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    along = xs * np.float32(np.cos(angle)) + ys * np.float32(np.sin(angle))
    texture = 1 + rng.uniform(0, 0.22) * (2 * along / max(height, width) - 1)
    if kind == 1:
        texture += rng.uniform(0.06, 0.16) * np.sin(along * rng.uniform(0.5, 1.6))
    elif kind == 2:
        texture += (
            rng.uniform(0.06, 0.14) * smooth_noise(rng, height, width, max(width // 5, 2))[..., 0]
        )
    elif kind == 3:
        pitch = rng.uniform(3.0, 8.0)
        checks = (np.floor(xs / pitch) + np.floor(ys / pitch)) % 2
        texture += rng.uniform(0.08, 0.2) * (checks - 0.5)
    return texture.astype(np.float32)


def contrasting_colour(
    rng: np.random.Generator, others: list[np.ndarray], distance: float = 85.0
) -> np.ndarray:
    """An RGB colour at least ``distance`` away from ``others``, or the farthest of twelve."""
    candidates = rng.uniform(15, 240, (12, 3))
    grey = candidates.mean(axis=1, keepdims=True)
    candidates = np.clip(grey + 1.35 * (candidates - grey), 10, 245)
    contrast = _contrast(candidates, others)
    enough = np.flatnonzero(contrast >= distance)
    return candidates[enough[0] if len(enough) else contrast.argmax()]


def figure_palette(rng: np.random.Generator, behind: list[np.ndarray]) -> dict[str, np.ndarray]:
    """RGB colours of the parts of a figure, by ``tone``; ``behind`` are those around it."""
    shirt = contrasting_colour(rng, behind)
    trousers = contrasting_colour(rng, [*behind, shirt], 70.0)
    skins = np.array([[116, 93, 76], [174, 140, 114], [232, 186, 152]])
    skin = skins[(_contrast(skins, behind) + rng.uniform(0, 60, 3)).argmax()]
    hairs = np.array([[30, 22, 18], [214, 178, 92], [122, 52, 28]])
    hair = hairs[np.minimum(_contrast(hairs, [*behind, skin]), 90 + 30 * rng.random(3)).argmax()]
    return {
        "shirt": shirt,
        "sleeve": shirt * 0.82,
        "trousers": trousers,
        "socks": trousers * 0.8,
        "skin": skin,
        "hair": hair,
        "tie": np.full(3, 245.0 if shirt.mean() < 128 else 20.0),
    }


def _contrast(candidates: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Distance of each candidate (n, 3) from the nearest of ``others``, (n,)."""
    return np.linalg.norm(candidates[:, None] - np.stack(others), axis=-1).min(axis=1)


def finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """What a lens and a sensor add: light fall-off, blur, grain. Returns uint8."""
    blur = rng.uniform(0.0, 0.85)
    if blur > 0.25:
        canvas = cv2.GaussianBlur(canvas, (0, 0), blur)
    size = canvas.shape[0]
    canvas = canvas * (1 + 0.06 * smooth_noise(rng, size, size, 2)[..., :1])
    canvas += rng.uniform(1.5, 6.0) * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)
