"""Outlines of the objects in the ``shapes`` data set: five kinds of filled shapes and a figure.

An outline is a stack of polygons around the origin, in pixels of the image, y down. It has no
colours and no place in the image; :mod:`.shapes_scene` gives it both.

Whether a joint of the figure is its left or its right one follows from the view: a face and a tie
are seen from the front, hair and a plain back from behind. As with people, a mirrored picture whose
left and right labels are exchanged is therefore again one that the generator could have drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CLASS_NAMES = ("pebble", "star", "arrow", "ring", "pair", "figure")

KEYPOINT_NAMES = (
    "head",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_hand",
    "right_hand",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_foot",
    "right_foot",
)
KEYPOINT_FLIP_MAP = tuple(
    (f"left_{joint}", f"right_{joint}")
    for joint in ("shoulder", "elbow", "hand", "hip", "knee", "foot")
)
# Bones, with the RGB colours that D2's visualizer draws them in.
KEYPOINT_CONNECTION_RULES = (
    ("head", "left_shoulder", (255, 214, 102)),
    ("head", "right_shoulder", (255, 214, 102)),
    ("left_shoulder", "right_shoulder", (255, 214, 102)),
    ("left_shoulder", "left_elbow", (255, 120, 90)),
    ("left_elbow", "left_hand", (255, 120, 90)),
    ("right_shoulder", "right_elbow", (90, 170, 255)),
    ("right_elbow", "right_hand", (90, 170, 255)),
    ("left_shoulder", "left_hip", (255, 120, 90)),
    ("right_shoulder", "right_hip", (90, 170, 255)),
    ("left_hip", "right_hip", (255, 214, 102)),
    ("left_hip", "left_knee", (255, 120, 90)),
    ("left_knee", "left_foot", (255, 120, 90)),
    ("right_hip", "right_knee", (90, 170, 255)),
    ("right_knee", "right_foot", (90, 170, 255)),
)
# The figures that COCO measured for people; the head has the tolerance of a shoulder.
KEYPOINT_OKS_SIGMAS = (
    *(0.079, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062),
    *(0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)

# Shortest longer side of the box, pixels: below it, too little of the shape would be left to see.
MIN_EXTENTS = {"pebble": 12, "star": 13, "arrow": 17, "ring": 14, "pair": 15, "figure": 24}


@dataclass(frozen=True)
class Part:
    """Polygons filled together by the even-odd rule, in one of the object's colours (``tone``)."""

    name: str
    polygons: tuple[np.ndarray, ...]  # each (n, 2), pixels
    tone: str = "body"


@dataclass(frozen=True)
class Outline:
    """Parts from back to front, and for the figure its joints.

    Attributes:
        parts: later parts cover earlier ones.
        keypoints: (13, 2) in pixels, order of ``KEYPOINT_NAMES``, or None.
        keypoint_parts: for each keypoint the names of the parts that meet there; the figure hides
            a keypoint itself where another of its parts lies on top.
    """

    parts: tuple[Part, ...]
    keypoints: np.ndarray | None = None
    keypoint_parts: tuple[frozenset[str], ...] = ()

    def box(self) -> np.ndarray:
        """Corners (x0, y0, x1, y1) of the box around all polygons."""
        points = np.concatenate([polygon for part in self.parts for polygon in part.polygons])
        return np.concatenate([points.min(axis=0), points.max(axis=0)])

    def transformed(self, matrix: np.ndarray, shift: np.ndarray) -> "Outline":
        """Every point p becomes ``matrix @ p + shift``."""
        parts = tuple(
            Part(part.name, tuple(p @ matrix.T + shift for p in part.polygons), part.tone)
            for part in self.parts
        )
        keypoints = None if self.keypoints is None else self.keypoints @ matrix.T + shift
        return Outline(parts, keypoints, self.keypoint_parts)

    def fitted(self, extent: float) -> "Outline":
        """Scaled so that the longer side of the box is ``extent`` pixels, box centre at 0."""
        x0, y0, x1, y1 = self.box()
        scale = extent / max(x1 - x0, y1 - y0)
        centre = np.array([x0 + x1, y0 + y1]) / 2
        return self.transformed(np.eye(2) * scale, -centre * scale)


def random_outline(rng: np.random.Generator, class_name: str, extent: float) -> Outline:
    """An outline of a class, posed and rotated, whose box has the longer side ``extent`` (pixels).

    Raises:
        KeyError: ``class_name`` is not in ``CLASS_NAMES``.
    """
    outline = _MAKERS[class_name](rng)
    turn = rng.normal(0, 0.25) if class_name == "figure" else rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(turn), np.sin(turn)
    rotation = np.array([[cos, -sin], [sin, cos]])
    return outline.transformed(rotation, np.zeros(2)).fitted(extent)


def random_cluster(rng: np.random.Generator, class_name: str, extent: float) -> Outline:
    """A dozen tiny outlines of one class, spread over ``extent`` pixels: a crowd."""
    parts = []
    for index in range(rng.integers(9, 16)):
        member = random_outline(rng, class_name, extent * rng.uniform(0.17, 0.25))
        member = member.transformed(np.eye(2), rng.normal(0, 0.22, 2) * extent)
        parts += [Part(f"{index}.{p.name}", p.polygons, f"{index}.{p.tone}") for p in member.parts]
    return Outline(tuple(parts)).fitted(extent)


def _regular(corners: int, radius: float = 1.0) -> np.ndarray:
    angle = np.arange(corners) * (2 * np.pi / corners)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius


def _capsule(start: np.ndarray, end: np.ndarray, radius: float, end_radius: float) -> np.ndarray:
    """A limb: two half discs, (20, 2), joined by straight sides."""
    along = end - start
    angle = np.arctan2(along[1], along[0]) + np.linspace(np.pi / 2, 3 * np.pi / 2, 10)
    cap = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.concatenate([start + cap * radius, end - cap * end_radius])


def _pebble(rng: np.random.Generator) -> Outline:
    """Convex: an ellipse or a polygon of three to six corners, stretched."""
    corners = int(rng.choice([40, 3, 4, 5, 6], p=[0.36, 0.16, 0.2, 0.14, 0.14]))
    points = _regular(corners)
    if corners < 40:
        angle = np.arange(corners) + rng.uniform(-0.18, 0.18, corners)
        angle *= 2 * np.pi / corners
        points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return Outline((Part("body", (points * [1, rng.uniform(0.55, 1)],)),))


def _star(rng: np.random.Generator) -> Outline:
    """Concave: four to seven points."""
    points = _regular(2 * int(rng.integers(4, 8)))
    points[1::2] *= rng.uniform(0.4, 0.58)
    return Outline((Part("body", (points * [1, rng.uniform(0.8, 1)],)),))


def _arrow(rng: np.random.Generator) -> Outline:
    """Thin: a shaft and a head; the shaft is about a sixth of the length."""
    shaft, head = rng.uniform(0.14, 0.19), rng.uniform(0.34, 0.44)
    neck = 1 - rng.uniform(0.5, 0.75)
    half = [[-1, -shaft], [neck, -shaft], [neck, -head], [1, 0]]
    points = np.array(half + [[x, -y] for x, y in half[2::-1]])
    return Outline((Part("body", (points,)),))


def _ring(rng: np.random.Generator) -> Outline:
    """With a hole: a round or a six-sided ring around a round hole."""
    outer = _regular(int(rng.choice([48, 6], p=[0.7, 0.3])))
    inner = _regular(40, rng.uniform(0.42, 0.62))
    stretch = [1, rng.uniform(0.7, 1)]
    return Outline((Part("body", (outer * stretch, inner * stretch)),))


def _pair(rng: np.random.Generator) -> Outline:
    """In two parts: half discs back to back, or the weights of a dumbbell without its bar."""
    gap = rng.uniform(0.17, 0.26)
    if rng.random() < 0.5:
        half = _regular(40)[10:31] * [rng.uniform(0.7, 1), 1]
        half -= [gap / 2, 0]
    else:
        half = _regular(int(rng.choice([32, 4]))) * [0.5, rng.uniform(0.5, 0.8)]
        half -= [0.5 + gap / 2, 0]
    return Outline((Part("body", (half, half * [-1, 1])),))


def _figure(rng: np.random.Generator) -> Outline:
    """A person of height about 1: two-bone arms and legs on a torso, seen from front or back."""
    front = rng.random() < 0.65
    joints = {"head": np.array([rng.normal(0, 0.012), -0.37])}
    limbs: dict[str, list[Part]] = {"arm": [], "leg": []}
    turn = rng.uniform(0.8, 1)  # breadth of the torso: turned a little to the side

    def bone(length: float, outward: float, x_sign: int) -> np.ndarray:
        return length * np.array([x_sign * np.sin(outward), np.cos(outward)])

    for x_sign in (1, -1):
        # Seen from the front, a person's left is on the right of the picture.
        side = "left" if (x_sign > 0) == front else "right"
        raised = np.deg2rad(rng.uniform(5, 150))
        bent = raised + np.deg2rad(rng.uniform(-45, 80))
        shoulder = np.array([0.12 * turn * x_sign, -0.215])
        elbow = shoulder + bone(0.175, raised, x_sign)
        hand = elbow + bone(0.165, bent, x_sign)
        stride = np.deg2rad(rng.uniform(0, 42))
        hip = np.array([0.065 * turn * x_sign, 0.06])
        knee = hip + bone(0.215, stride, x_sign)
        foot = knee + bone(0.215, stride - np.deg2rad(rng.uniform(-12, 50)), x_sign)
        for name, joint in zip(
            ("shoulder", "elbow", "hand", "hip", "knee", "foot"),
            (shoulder, elbow, hand, hip, knee, foot),
            strict=True,
        ):
            joints[f"{side}_{name}"] = joint
        limbs["arm"] += [
            Part(f"{side}_upper_arm", (_capsule(shoulder, elbow, 0.045, 0.04),), "sleeve"),
            Part(f"{side}_forearm", (_capsule(elbow, hand, 0.036, 0.04),), "skin"),
        ]
        limbs["leg"] += [
            Part(f"{side}_thigh", (_capsule(hip, knee, 0.058, 0.047),), "trousers"),
            Part(f"{side}_shin", (_capsule(knee, foot, 0.047, 0.044),), "socks"),
        ]

    waist = np.array([[0.1 * turn, 0.08], [-0.1 * turn, 0.08]])
    collar = np.array([[-0.15 * turn, -0.235], [-0.05, -0.265], [0.05, -0.265]])
    torso = np.concatenate([waist, collar, [[0.15 * turn, -0.235]]])
    neck = _capsule(joints["head"], np.array([0, -0.24]), 0.035, 0.035)
    skull = _regular(32) * [0.085, 0.1] + joints["head"]
    body = [
        Part("torso", (torso,), "shirt"),
        Part("neck", (neck,), "skin" if front else "hair"),
        Part("head", (skull,), "skin" if front else "hair"),
    ]
    if front:
        eye = _regular(8, 0.018) + joints["head"] + [0, 0.005]
        tie = np.array([[-0.03, -0.25], [0.03, -0.25], [0.04, -0.03], [0, 0.01], [-0.04, -0.03]])
        body += [
            Part("tie", (tie * [turn, 1],), "tie"),
            Part("head", (skull[15:33],), "hair"),
            Part("head", (eye + [0.034, 0], eye - [0.034, 0]), "hair"),
        ]
    arms_in_front = rng.random() < 0.5
    order = [limbs["leg"], body, limbs["arm"]] if arms_in_front else [*limbs.values(), body]
    meeting = {
        "head": ("head",),
        "shoulder": ("{}_upper_arm", "torso"),
        "elbow": ("{}_upper_arm", "{}_forearm"),
        "hand": ("{}_forearm",),
        "hip": ("{}_thigh", "torso", "left_thigh", "right_thigh"),
        "knee": ("{}_thigh", "{}_shin"),
        "foot": ("{}_shin",),
    }
    keypoint_parts = []
    for name in KEYPOINT_NAMES:
        side, _, joint = name.rpartition("_")
        keypoint_parts.append(frozenset(part.format(side) for part in meeting[joint]))
    return Outline(
        tuple(part for stack in order for part in stack),
        np.stack([joints[name] for name in KEYPOINT_NAMES]),
        tuple(keypoint_parts),
    )


_MAKERS: dict[str, Callable[[np.random.Generator], Outline]] = {
    "pebble": _pebble,
    "star": _star,
    "arrow": _arrow,
    "ring": _ring,
    "pair": _pair,
    "figure": _figure,
}
