"""Draws images of twenty shapes and of persons, with the exact masks of what remains visible.

Every object is a `Layer`: its coverage of each pixel, drawn larger and averaged, and its colour. `compose` paints
layers from back to front; a pixel belongs to the front-most layer that covers at least half of it.
Shapes keep their identity under rotation and reflection, because training flips the images.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sis_lightning.datasets.constants import COCO_KEYPOINTS

Floats = NDArray[np.float32]
Points = NDArray[np.float64]
Bools = NDArray[np.bool_]
Bytes = NDArray[np.uint8]
Outline = list[tuple[Points, bool]]  # rings in painting order: True fills, False cuts a hole
Colour = tuple[float, float, float]

SHAPES = (
    *("disc", "ring", "half-disc", "square", "frame", "bar", "triangle", "plus", "star", "crescent"),
    *("heart", "arrow", "ell", "tee", "u", "zigzag", "hourglass", "gear", "trefoil", "ellipse"),
)
TEXTURES = ("plain", "stripes", "checks", "dots", "grain")
BACKGROUNDS = ("gradient", "blobs", "stripes", "checks", "grain")
PERSON = len(SHAPES)
"""The label of a person; smaller labels index `SHAPES`."""

_OVERSAMPLING = 3
_LEAST_VISIBLE = 0.05
_FACE_KEYPOINTS = 3  # nose and eyes, which are not visible from behind


@dataclass(frozen=True, eq=False)
class Layer:
    """One drawn object before others hide parts of it.

    Attributes:
        label: Index into `SHAPES`, or `PERSON`.
        left: Column of the image where the layer begins; negative if the border cuts it off.
        top: Row of the image where the layer begins.
        colour: (h, w, 3) in 0..1, multiplied by the coverage.
        coverage: (h, w), the share of each pixel that is covered.
        crowd: Whether the layer is a group of objects that are not outlined one by one.
        keypoints: Keypoints of a person (17, 3): x, y in the image, and 1 if it faces the viewer, else 0.
    """

    label: int
    left: int
    top: int
    colour: Floats
    coverage: Floats
    crowd: bool = False
    keypoints: Points | None = None

    def overlap(self, height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The range of an image that the layer covers, and the same range of the layer."""
        rows, columns = self.coverage.shape
        top, left = max(0, self.top), max(0, self.left)
        bottom = max(top, min(height, self.top + rows))
        right = max(left, min(width, self.left + columns))
        own = slice(top - self.top, bottom - self.top), slice(left - self.left, right - self.left)
        return (slice(top, bottom), slice(left, right)), own


@dataclass(frozen=True)
class Instance:
    """The annotation of one object in a finished image.

    Attributes:
        label: Index into `SHAPES`, or `PERSON`.
        box: Left, top, right, bottom of the visible pixels, the last two exclusive.
        visible: Visible share of the whole silhouette, including the part outside of the image.
        truncated: Whether the border of the image cuts it.
        occluded: Whether other objects hide more than 5 % of the part inside of the image.
        crowd: Whether it is a group.
        keypoints: The 17 keypoints x, y, v, one after the other; empty for shapes.
    """

    label: int
    box: tuple[int, int, int, int]
    visible: float
    truncated: bool
    occluded: bool
    crowd: bool
    keypoints: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Larger side of the box."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True, eq=False)
class Scene:
    """A finished image.

    Attributes:
        image: RGB (h, w, 3), uint8.
        owners: The object of each pixel (h, w): 0 for the background, k for ``instances[k - 1]``.
        instances: The objects, from back to front.
    """

    image: Bytes
    owners: Bytes
    instances: tuple[Instance, ...]


def compose(background: Floats, layers: Sequence[Layer], min_object: int) -> Scene:
    """Paints layers from back to front and measures what remains visible of each.

    Args:
        background: RGB (h, w, 3) in 0…1, which is painted over.
        layers: The layers, from back to front. A layer is left out if less than 5 % of it would remain visible, or less
            than `min_object`.
        min_object: Minimum size (longer side of the box) of the visible part of a layer, in px.

    Returns:
        The image with its instances.
    """
    height, width = background.shape[:2]
    kept: list[Layer] = []
    free = np.ones((height, width), dtype=np.bool_)
    for layer in reversed(layers):
        there, own = layer.overlap(height, width)
        visible = free[there] & (layer.coverage[own] >= 0.5)
        full = np.count_nonzero(layer.coverage >= 0.5)
        if _extent(visible) >= min_object and visible.sum() >= _LEAST_VISIBLE * full:
            free[there] &= layer.coverage[own] < 0.5
            kept.append(layer)
    kept.reverse()
    owners = np.zeros((height, width), dtype=np.uint8)
    for number, layer in enumerate(kept, start=1):
        there, own = layer.overlap(height, width)
        background[there] *= 1 - layer.coverage[own][..., None]
        background[there] += layer.colour[own]
        owners[there][layer.coverage[own] >= 0.5] = number
    instances = tuple(_measure(layer, number, owners) for number, layer in enumerate(kept, start=1))
    return Scene(_to_bytes(background), owners, instances)


def _extent(mask: Bools) -> int:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1 if len(rows) else 0


def _to_bytes(image: Floats) -> Bytes:
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _from_bytes(image: Image.Image) -> Floats:
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _measure(layer: Layer, number: int, owners: Bytes) -> Instance:
    there, own = layer.overlap(*owners.shape)
    mask = owners[there] == number
    visible = np.count_nonzero(mask)
    inside = np.count_nonzero(layer.coverage[own] >= 0.5)
    full = np.count_nonzero(layer.coverage >= 0.5)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = there[0].start, there[1].start
    return Instance(
        label=layer.label,
        box=(left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1),
        visible=visible / full,
        truncated=bool(inside < full),
        occluded=bool(visible < 0.95 * inside),
        crowd=layer.crowd,
        keypoints=() if layer.keypoints is None else _keypoints(layer.keypoints, number, owners),
    )


def _keypoints(points: Points, number: int, owners: Bytes) -> tuple[int, ...]:
    height, width = owners.shape
    keypoints: list[int] = []
    for x, y, shown in np.floor(points).astype(int).tolist():
        if not (shown and 0 <= x < width and 0 <= y < height):
            keypoints += (0, 0, 0)
        else:
            keypoints += (x, y, 1 if owners[y, x] > number else 2)  # greater numbers are in front
    return tuple(keypoints)


# Shapes ------------------------------------------------------------------------------------------------------


def _arc(radius: float, start: float, stop: float, centre: tuple[float, float] = (0, 0), count: int = 40) -> Points:
    angle = np.radians(np.linspace(start, stop, count))
    return np.asarray(centre) + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _disc(radius: float, centre: tuple[float, float] = (0, 0)) -> Points:
    return _arc(radius, 0, 360, centre)


def _polar(radii: Sequence[float], repeats: int) -> Points:
    """A closed curve around 0 through `radii`, `repeats` times, at equal angles."""
    radius = np.tile(radii, repeats)
    angle = 2 * np.pi * np.arange(len(radius)) / len(radius)
    points: Points = radius[:, None] * np.stack([np.sin(angle), -np.cos(angle)], axis=1)
    return points


def _ring(*points: tuple[float, float]) -> Points:
    return np.asarray(points, dtype=np.float64)


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 48)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1) / 16


def _zigzag() -> Points:
    middle = _ring((-1, 0.4), (-0.5, -0.4), (0, 0.4), (0.5, -0.4), (1, 0.4))
    half = np.array([0, 0.27])
    return np.concatenate([middle - half, middle[::-1] + half])


def _square(half: float) -> Points:
    return _ring((-half, -half), (half, -half), (half, half), (-half, half))


_PLUS = ((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3))
_OUTLINES: dict[str, Outline] = {
    "disc": [(_disc(1), True)],
    "ring": [(_disc(1), True), (_disc(0.58), False)],
    "half-disc": [(_arc(1, 0, 180), True)],
    "square": [(_square(1), True)],
    "frame": [(_square(1), True), (_square(0.56), False)],
    "bar": [(_ring((-1, -0.15), (1, -0.15), (1, 0.15), (-1, 0.15)) * (1, 1.9), True)],
    "triangle": [(_polar([1], 3), True)],
    "plus": [(_ring(*_PLUS, *((-x, -y) for x, y in _PLUS)), True)],
    "star": [(_polar([1, 0.42], 5), True)],
    "crescent": [(np.concatenate([_arc(1, 54, 306), _arc(0.82, 279.9, 80.1, (0.45, 0))]), True)],
    "heart": [(_heart(), True)],
    "arrow": [
        (_ring((-1, -0.2), (0, -0.2), (0, -0.65), (1, 0), (0, 0.65), (0, 0.2), (-1, 0.2)), True),
    ],
    "ell": [(_ring((-1, -1), (-0.4, -1), (-0.4, 0.4), (1, 0.4), (1, 1), (-1, 1)), True)],
    "tee": [
        (_ring((-1, -1), (1, -1), (1, -0.42), (0.29, -0.42), (0.29, 1), (-0.29, 1), (-0.29, -0.42), (-1, -0.42)), True),
    ],
    "u": [(_ring((-1, -1), (-0.5, -1), (-0.5, 0.5), (0.5, 0.5), (0.5, -1), (1, -1), (1, 1), (-1, 1)), True)],
    "zigzag": [(_zigzag(), True)],
    "hourglass": [(_ring((-0.8, -1), (0.8, -1), (0.14, 0), (0.8, 1), (-0.8, 1), (-0.14, 0)), True)],
    "gear": [(_polar([1, 1, 0.66, 0.66], 8), True), (_disc(0.28), False)],
    "trefoil": [
        *((_disc(0.5, (0.56 * float(np.sin(a)), -0.56 * float(np.cos(a)))), True) for a in (0, 2.0944, 4.1888)),
        (_disc(0.3), True),
    ],
    "ellipse": [(_disc(1) * (1, 0.5), True)],
}


def _pose(rng: np.random.Generator, shape: str, extent: float, rotation: float) -> Outline:
    """Rotates, reflects and squeezes a shape; its box is then centred on 0 with `extent` as its longer side."""
    angle = np.radians(rng.uniform(-rotation, rotation))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    squeeze = (rng.uniform(0.88, 1.13) * rng.choice((-1, 1)), 1)
    rings = [ring * squeeze @ turn for ring, _ in _OUTLINES[shape]]
    low = np.min([ring.min(axis=0) for ring in rings], axis=0)
    high = np.max([ring.max(axis=0) for ring in rings], axis=0)
    scale = extent / (high - low).max()
    fills = (fill for _, fill in _OUTLINES[shape])
    return [((ring - (low + high) / 2) * scale, fill) for ring, fill in zip(rings, fills, strict=True)]


def _bounds(outline: Outline) -> tuple[Points, Points]:
    points = np.concatenate([ring for ring, _ in outline])
    return points.min(axis=0), points.max(axis=0)


def _raster(outline: Outline) -> tuple[int, int, Floats]:
    """Left, top and the coverage of the pixels around an outline."""
    low, high = _bounds(outline)
    left, top = (int(v) for v in np.floor(low))
    width, height = (int(v) for v in np.ceil(high) - (left, top))
    image = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    draw = ImageDraw.Draw(image)
    for ring, fill in outline:
        # Pillow's coordinates are pixel centres, these are pixel edges.
        corners = (ring - (left, top)) * _OVERSAMPLING - 0.5
        draw.polygon(corners.ravel().tolist(), fill=255 if fill else 0)
    return left, top, _from_bytes(image.reduce(_OVERSAMPLING))


def shape_layer(
    rng: np.random.Generator,
    label: int,
    outline: Outline,
    texture: str,
    period: float,
    *,
    contrast: float = 1,
    crowd: bool = False,
) -> Layer:
    """Fills an outline with a texture in two tones of a hue that leans weakly on the class.

    Args:
        rng: Source of the colours and of the texture's direction.
        label: Index into `SHAPES`.
        outline: Rings in coordinates of the image.
        texture: One of `TEXTURES`.
        period: Pixels after which the texture repeats.
        contrast: Contrast of the texture's two tones, 0…1.
        crowd: Whether the outline is a group.

    Returns:
        The layer.
    """
    left, top, coverage = _raster(outline)
    hue = label / len(SHAPES) + rng.normal(0, 0.07)
    tone = _hsv(hue, rng.uniform(0.5, 1), rng.uniform(0.6, 1))
    far = _hsv(hue + rng.normal(0, 0.05), *rng.permutation([(1, 0.3), (0.25, 1)])[0])
    red, green, blue = (near + contrast * (end - near) for near, end in zip(tone, far, strict=True))
    colour = _blend(_texture(rng, texture, coverage.shape, period), tone, (red, green, blue))
    return Layer(label, left, top, colour * coverage[..., None], coverage, crowd)


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb(hue % 1, saturation, value)


def _blend(weight: Floats, low: Colour, high: Colour) -> Floats:
    """Mixes two colours: `low` for a weight of -1, `high` for 1."""
    first, last = np.array(low, dtype=np.float32), np.array(high, dtype=np.float32)
    return (weight[..., None] + 1) * (0.5 * (last - first)) + first


def _texture(rng: np.random.Generator, name: str, shape: tuple[int, ...], period: float) -> Floats:
    """Weights in -1…1 of a texture's two colours."""
    if name == "plain":
        return np.full(shape, -1, dtype=np.float32)
    if name == "grain":
        return np.clip(rng.standard_normal(shape, dtype=np.float32), -1, 1)
    angle = rng.uniform(0, np.pi)
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    across, along = np.float32(np.cos(angle) / period), np.float32(np.sin(angle) / period)
    x = columns.astype(np.float32) + np.float32(rng.uniform(0, period))
    y = rows.astype(np.float32)
    u: Floats = np.sin(2 * np.pi * (x * across + y * along))
    v: Floats = np.sin(2 * np.pi * (y * across - x * along))
    wave: Floats = {"stripes": 3 * u, "checks": 4 * u * v, "dots": 3 * (u + v - 0.7)}[name]
    return wave.clip(-1, 1)


# Backgrounds -------------------------------------------------------------------------------------------------


def background(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Draws a pale or dull texture with a little noise, (height, width, 3) in 0..1."""
    name = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    size = max(height, width)
    if name in ("gradient", "blobs"):
        cells = 2 if name == "gradient" else int(rng.integers(4, 9))
        weight = _smooth(rng, cells, height, width)
        weight = np.clip(weight * (1 if name == "gradient" else 3), -1, 1)
    else:
        weight = _texture(rng, name, (height, width), size * rng.uniform(0.06, 0.3))
    value = rng.uniform(0.2, 0.95)
    low = _hsv(rng.random(), rng.uniform(0, 0.45), value)
    high = _hsv(rng.random(), rng.uniform(0, 0.45), np.clip(value + rng.uniform(-0.35, 0.35), 0.1, 1))
    noise = rng.standard_normal((height, width), dtype=np.float32)
    return _blend(weight, low, high) + (rng.uniform(0, 0.06) * noise).astype(np.float32)[..., None]


def _smooth(rng: np.random.Generator, cells: int, height: int, width: int) -> Floats:
    image = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


# Persons -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pose:
    """Ranges of angles in degrees: upper limbs away from straight down, lower limbs against the upper ones."""

    arm: tuple[float, float]
    elbow: tuple[float, float]
    thigh: tuple[float, float] = (1, 7)
    knee: tuple[float, float] = (-4, 2)
    thigh_length: float = 0.22


_POSES = (
    _Pose(arm=(8, 30), elbow=(-12, 18)),  # standing
    _Pose(arm=(100, 160), elbow=(-25, 40)),  # both arms raised
    _Pose(arm=(65, 100), elbow=(-20, 80), thigh=(4, 14)),  # arms out
    _Pose(arm=(12, 40), elbow=(-40, 0), thigh=(8, 26), knee=(-22, -4)),  # walking
    _Pose(arm=(38, 58), elbow=(-125, -95)),  # hands on the hips
    _Pose(arm=(15, 40), elbow=(-40, -5), thigh=(25, 60), knee=(-60, -28), thigh_length=0.13),  # sitting
)
_SKINS: tuple[Colour, ...] = ((0.98, 0.83, 0.71), (0.91, 0.7, 0.55), (0.72, 0.5, 0.35), (0.45, 0.3, 0.2))
_HAIRS: tuple[Colour, ...] = ((0.1, 0.08, 0.07), (0.32, 0.19, 0.1), (0.66, 0.46, 0.18), (0.5, 0.14, 0.08))
_HEAD = 0.092  # radii in heights of a standing body
_SOLE = np.array([0.018, 0.02])  # from the ankle
_LIMB = {"arm": 0.034, "leg": 0.046, "torso": 0.05}


def _skeleton(rng: np.random.Generator, facing: int) -> Points:
    """Poses a body of height 1 with the neck at 0; y points downwards.

    Args:
        rng: Source of the pose.
        facing: 1 towards the viewer, so that the left hand is on the right of the image; -1 away.

    Returns:
        The keypoints (17, 2) in COCO's order.
    """
    poses = [_POSES[rng.integers(len(_POSES))]] * 2
    if rng.random() < 0.35:  # the arms do different things
        poses[rng.integers(2)] = _POSES[rng.integers(5)]
    legs = poses[0]
    shoulder, hip, torso = rng.uniform(0.105, 0.13), rng.uniform(0.06, 0.08), rng.uniform(0.29, 0.32)
    look = rng.uniform(-0.02, 0.02)
    body = np.zeros((len(COCO_KEYPOINTS), 2))
    body[0] = (look * 1.5, -0.085)
    for side, (sign, pose) in enumerate(zip((facing, -facing), poses, strict=True)):
        body[1 + side] = (look + 0.036 * sign, -0.115)
        body[3 + side] = (0.09 * sign, -0.1)
        body[5 + side] = (shoulder * sign, 0.03)
        arm = rng.uniform(*pose.arm)
        forearm = arm + rng.uniform(*pose.elbow)
        body[7 + side] = body[5 + side] + _limb(arm, 0.15, sign)
        body[9 + side] = body[7 + side] + _limb(forearm, 0.145, sign)
        body[11 + side] = (hip * sign, torso)
        thigh = rng.uniform(*legs.thigh)
        body[13 + side] = body[11 + side] + _limb(thigh, legs.thigh_length, sign)
        body[15 + side] = body[13 + side] + _limb(thigh + rng.uniform(*legs.knee), 0.21, sign)
    return body


def _limb(degrees: float, length: float, sign: int) -> Points:
    return length * np.array([sign * np.sin(np.radians(degrees)), np.cos(np.radians(degrees))])


class _Easel:
    """Draws the parts of a body onto a transparent image, in units of the body."""

    def __init__(self, body: Points, tilt: float, height: float) -> None:
        turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        crown = np.array([[0, -0.1 - _HEAD]])
        turned = np.concatenate([body, crown]) @ turn
        low, high = turned.min(axis=0) - 0.06, turned.max(axis=0) + 0.06
        self.scale = height / (high - low)[1]
        self._turn, self._low = turn, low - 0.06
        width, height = np.ceil((high - low + 0.12) * self.scale).astype(int).tolist()
        self._image = Image.new("RGBA", (width * _OVERSAMPLING, int(height) * _OVERSAMPLING))
        self._draw = ImageDraw.Draw(self._image)

    def place(self, points: Points) -> Points:
        """Points of the body in pixels of the finished image."""
        placed: Points = (points @ self._turn - self._low) * self.scale
        return placed

    def polygon(self, colour: Colour, *points: Points | tuple[float, float]) -> None:
        """Fills a polygon."""
        corners = self.place(np.array(points)) * _OVERSAMPLING - 0.5
        self._draw.polygon(corners.ravel().tolist(), fill=_ink(colour))

    def chain(self, colour: Colour, radius: float, *points: Points | tuple[float, float]) -> None:
        """Draws thick rounded limbs from point to point (or one disc)."""
        corners = self.place(np.array(points)) * _OVERSAMPLING - 0.5
        thickness = radius * self.scale * _OVERSAMPLING
        for x, y in corners:
            self._draw.ellipse((x - thickness, y - thickness, x + thickness, y + thickness), fill=_ink(colour))
        if len(points) > 1:
            self._draw.line(corners.ravel().tolist(), fill=_ink(colour), width=max(1, round(2 * thickness)))

    def finish(self) -> tuple[Floats, Floats]:
        """Returns colour multiplied by coverage, and coverage."""
        sheet = _from_bytes(self._image.convert("RGBa").reduce(_OVERSAMPLING))
        return sheet[..., :3], sheet[..., 3]


def _ink(colour: Colour) -> tuple[int, int, int, int]:
    red, green, blue = (round(255 * channel) for channel in colour)
    return red, green, blue, 255


def person_layer(rng: np.random.Generator, height: float, centre: tuple[float, float]) -> Layer:
    """Draws a person from the front or from behind.

    Args:
        rng: Source of pose, clothes and facing.
        height: Height of the person in the pose, in px.
        centre: Middle of the person in the image.

    Returns:
        The layer with its keypoints; nose and eyes are not annotated from behind.
    """
    facing = int(rng.choice((1, -1)))
    body = _skeleton(rng, facing)
    easel = _Easel(body, np.radians(rng.uniform(-20, 20)), height)
    _dress(rng, easel, body, facing)
    colour, coverage = easel.finish()
    grain = 1 + 0.06 * rng.standard_normal(coverage.shape, dtype=np.float32)
    left, top = round(centre[0] - coverage.shape[1] / 2), round(centre[1] - coverage.shape[0] / 2)
    shown = np.ones((len(COCO_KEYPOINTS), 1))
    shown[:_FACE_KEYPOINTS] = facing > 0
    keypoints = np.concatenate([easel.place(body) + np.array([left, top]), shown], axis=1)
    return Layer(PERSON, left, top, colour * grain[..., None], coverage, keypoints=keypoints)


def _dress(rng: np.random.Generator, easel: _Easel, body: Points, facing: int) -> None:
    skin, hair = _SKINS[rng.integers(len(_SKINS))], _HAIRS[rng.integers(len(_HAIRS))]
    hue = rng.random()
    shirt = _hsv(hue, rng.uniform(0.4, 1), rng.uniform(0.45, 0.9))
    trousers = _hsv(hue + rng.uniform(0.25, 0.75), rng.uniform(0.2, 0.9), rng.uniform(0.2, 0.6))
    shoulders, hips = body[5:7], body[11:13]
    for side in range(2):
        hip, knee, ankle = body[11 + side], body[13 + side], body[15 + side]
        easel.chain((0.12, 0.1, 0.1), 0.032, ankle + _SOLE * (0, 1), ankle + _SOLE * (np.sign(hip[0]), 1.4))
        easel.chain(trousers, _LIMB["leg"], hip, knee)
        easel.chain(trousers, _LIMB["leg"] * 0.82, knee, ankle)
    easel.chain(trousers, _LIMB["torso"], hips[0], hips[1])
    easel.chain(skin, 0.04, (0, -0.06), (0, 0.03))
    waist = hips - (0, 0.03)
    easel.polygon(shirt, *shoulders, *waist[::-1])
    easel.chain(shirt, _LIMB["torso"], *shoulders, *waist[::-1], shoulders[0])
    if facing > 0:
        _draw_front(easel, (skin, shirt), waist)
    elif rng.random() < 0.6:
        bag = _hsv(hue + rng.uniform(0.3, 0.7), rng.uniform(0.5, 1), rng.uniform(0.3, 0.8))
        easel.polygon(bag, (-0.07, 0.03), (0.07, 0.03), (0.07, 0.2), (-0.07, 0.2))
        easel.chain(bag, 0.035, (-0.07, 0.05), (0.07, 0.05), (0.07, 0.2), (-0.07, 0.2), (-0.07, 0.05))
    for side in range(2):
        shoulder, elbow, wrist = body[5 + side], body[7 + side], body[9 + side]
        easel.chain(skin, _LIMB["arm"] * 0.85, elbow, wrist)
        easel.chain(skin, _LIMB["arm"] * 1.1, wrist)
        easel.chain(_shade(shirt, 0.8), _LIMB["arm"] * 1.15, shoulder, elbow)
    _draw_head(rng, easel, body, (skin, hair), facing)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = colour
    return red * factor, green * factor, blue * factor


def _draw_front(easel: _Easel, colours: tuple[Colour, Colour], waist: Points) -> None:
    skin, (red, green, blue) = colours
    pale = (red + 2) / 3, (green + 2) / 3, (blue + 2) / 3
    bottom = float(waist[0, 1])
    easel.polygon(pale, (-0.035, -0.01), (0.035, -0.01), (0.035, bottom + 0.04), (-0.035, bottom + 0.04))
    easel.polygon(skin, (-0.05, -0.02), (0.05, -0.02), (0, 0.055))


def _draw_head(
    rng: np.random.Generator, easel: _Easel, body: Points, colours: tuple[Colour, Colour], facing: int
) -> None:
    skin, hair = colours
    ears = body[3:5]
    if facing < 0:
        easel.chain(skin, 0.022, ears[0])
        easel.chain(skin, 0.022, ears[1])
        easel.chain(hair, _HEAD, (0, -0.1))
        if rng.random() < 0.4:
            easel.chain(_shade(hair, 0.75), 0.03, (0, -0.12), (0, 0.02))
        return
    nose, eyes = body[0], body[1:3]
    look = float(eyes[:, 0].mean())
    easel.chain(hair, _HEAD, (0, -0.105))
    easel.chain(skin, 0.022, ears[0])
    easel.chain(skin, 0.022, ears[1])
    easel.chain(skin, _HEAD * 0.8, (look * 0.6, -0.092), (look * 0.6, -0.075))
    for eye in eyes:
        easel.chain((1, 1, 1), 0.02, eye)
        easel.chain((0.05, 0.05, 0.1), 0.013, eye)
    easel.chain(_shade(skin, 0.7), 0.011, nose - (0, 0.012), nose)
    easel.chain((0.6, 0.15, 0.15), 0.009, (look - 0.028, -0.045), (look + 0.028, -0.045))


# Scenes ------------------------------------------------------------------------------------------------------


def small_image(rng: np.random.Generator, shape: int, texture: int, side: int = 32) -> Bytes:
    """Draws one large shape of one texture in a small square image, rotated by at most 25 degrees."""
    outline = _pose(rng, SHAPES[shape], rng.uniform(0.62, 0.94) * side, 25)
    outline = _move(rng, outline, side, side, free=False)
    layer = shape_layer(rng, shape, outline, TEXTURES[texture], rng.uniform(0.17, 0.25) * side)
    return compose(background(rng, side, side), [layer], 0).image


def _move(rng: np.random.Generator, outline: Outline, height: int, width: int, free: bool) -> Outline:
    """Moves an outline that is centred on 0 into an image: anywhere if `free`, else inside if it fits."""
    margin = np.zeros(2) if free else (_bounds(outline)[1] - _bounds(outline)[0]) / 2
    room = np.array([width, height])
    margin = np.minimum(margin, room / 2)
    centre = rng.uniform(margin, room - margin)
    return [(ring + centre, fill) for ring, fill in outline]


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(max(low, high)))))


@dataclass(frozen=True)
class Stage:
    """The settings that all images of one data set share.

    Attributes:
        size: Longer side of the images in px; the other is as long or 3/4 of it.
        min_object: Minimum size (longer side of the box) of the visible part of an object, in px.
        rotation: Maximum rotation of shapes in degrees, either way.
    """

    size: int
    min_object: int
    rotation: float

    def shapes(self, rng: np.random.Generator, first: int, crowd: bool = False) -> Scene:
        """Draws one to five shapes (and perhaps a crowd), of which the rearmost is large.

        Args:
            rng: Source of everything.
            first: Class of the rearmost shape, which callers cycle through to balance the classes.
            crowd: Whether to add a group of small shapes.

        Returns:
            An image with at least one instance.
        """
        canvas = self._background(rng)
        large = max(1.3 * self.min_object, 0.42 * self.size)
        layers = [self._shape(rng, canvas, first, _log_uniform(rng, large, 0.95 * self.size), free=0.1)]
        for _ in range(rng.choice(5, p=(0.28, 0.3, 0.22, 0.12, 0.08))):
            extent = _log_uniform(rng, self.min_object + 1, 0.75 * self.size)
            layers.append(self._shape(rng, canvas, int(rng.integers(len(SHAPES))), extent, free=0.2))
        if crowd:
            layers.append(self._crowd(rng, canvas))
        scene = compose(canvas, layers, self.min_object)
        return scene if scene.instances else self.shapes(rng, first, crowd)

    def persons(self, rng: np.random.Generator) -> Scene:
        """Draws one to three persons side by side, with up to two shapes before or behind them."""
        canvas = self._background(rng)
        height, width = canvas.shape[:2]
        count = int(rng.choice((1, 2, 3), p=(0.5, 0.35, 0.15)))
        layers = []
        for place in rng.permutation(count):
            low = 0.25 if rng.random() < 0.1 else 0.45
            tall = max(1.3 * self.min_object, height * _log_uniform(rng, low, 1))
            middle = height - tall / 2 if tall > 0.9 * height else rng.uniform(tall / 2, height - tall / 2)
            across = width * (place + rng.uniform(0.3, 0.7)) / count
            layers.append(person_layer(rng, tall, (across, middle + rng.normal(0, 0.03) * height)))
        for _ in range(rng.choice(3, p=(0.5, 0.3, 0.2))):
            extent = _log_uniform(rng, self.min_object + 1, 0.4 * self.size)
            shape = self._shape(rng, canvas, int(rng.integers(len(SHAPES))), extent, free=0.2)
            layers.insert(int(rng.integers(len(layers) + 1)), shape)
        return compose(canvas, layers, self.min_object)

    def empty(self, rng: np.random.Generator) -> Scene:
        """Draws a background without objects."""
        return compose(self._background(rng), [], self.min_object)

    def _background(self, rng: np.random.Generator) -> Floats:
        short = self.size * 3 // 4
        sides = ((self.size, self.size), (self.size, short), (short, self.size))
        return background(rng, *sides[rng.integers(3)])

    def _shape(self, rng: np.random.Generator, canvas: Floats, label: int, extent: float, free: float) -> Layer:
        height, width = canvas.shape[:2]
        outline = _pose(rng, SHAPES[label], extent, self.rotation)
        outline = _move(rng, outline, height, width, free=rng.random() < free)
        texture = TEXTURES[rng.integers(len(TEXTURES))]
        period = max(4, rng.uniform(0.12, 0.3) * extent)
        # In a scene the silhouette names the class: a loud texture would hide it from a small network.
        return shape_layer(rng, label, outline, texture, period, contrast=0.5)

    def _crowd(self, rng: np.random.Generator, canvas: Floats) -> Layer:
        label = int(rng.integers(len(SHAPES)))
        extent = min(1.2 * self.min_object, self.size / 6)
        group: Outline = []
        for row, column in np.ndindex(2, 4):
            offset = extent * (np.array([column, row]) + rng.uniform(-0.2, 0.2, 2))
            group += [(ring + offset, fill) for ring, fill in _pose(rng, SHAPES[label], extent, self.rotation)]
        low, high = _bounds(group)
        group = [(ring - (low + high) / 2, fill) for ring, fill in group]
        outline = _move(rng, group, canvas.shape[0], canvas.shape[1], free=False)
        return shape_layer(rng, label, outline, TEXTURES[rng.integers(len(TEXTURES))], max(4, extent), crowd=True)
