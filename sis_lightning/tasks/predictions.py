"""Predictions of the tasks for one image, as typed objects that draw and save themselves."""

from __future__ import annotations

import dataclasses
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import torch
from matplotlib import colormaps, get_data_path
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

from sis_lightning.datasets.constants import VOID, voc_palette
from sis_lightning.errors import UsageError

Color = tuple[int, int, int]

#: Names under which data sets have a background class, which overlays leave uncoloured.
_BACKGROUNDS = frozenset({"background", "_background_", "bg", "0"})


#: Number of pixels that are drawn at once.
_STRIP = 4_000_000


def _upscaled(image: Tensor) -> tuple[Tensor, int, float]:
    """Repeats the pixels of a small image until its longer side has at least 480 px, so that labels can be read.

    Args:
        image: Image (3, H, W), uint8.

    Returns:
        The upscaled image, the factor, and the factor for line widths and font sizes (1 for 640 px).
    """
    factor = -(-480 // max(image.shape[1:]))
    image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return image, factor, max(1.0, max(image.shape[1:]) / 640)


def _tab10(index: int) -> Color:
    red, green, blue = (int(255 * part) for part in colormaps["tab10"](index % 10)[:3])
    return red, green, blue


# Not frozen: a Trainer that returns predictions moves their tensors to the CPU, which it refuses to do in frozen ones.


@dataclass(eq=False, repr=False)
class Prediction(ABC):
    """The prediction of a task for one image.

    In a notebook it displays itself. Tensors are on the CPU.

    Attributes:
        image: The image (C, H, W), uint8.
        name: File name, name within the data set, or a running number.
    """

    image: Tensor
    name: str

    @abstractmethod
    def draw(self) -> Tensor:
        """Draws the prediction on the image.

        Returns:
            RGB (3, h, w), uint8. Images of less than 480 px are upscaled by a whole factor.
        """

    @abstractmethod
    def describe(self) -> str:
        """One line that says what was found."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The prediction without pixels, as plain data for JSON."""

    @abstractmethod
    def write(self, folder: Path) -> dict[str, Any]:
        """Writes the files of this prediction into a folder, as `sis-lightning predict` does.

        Args:
            folder: The folder; subfolders are created.

        Returns:
            `to_dict()` with the paths of the files, relative to the folder.
        """

    def columns(self) -> dict[str, float]:
        """Further columns of the table of all predictions, beside the plain values of `write`."""
        return {}

    def coco_categories(self) -> list[dict[str, Any]]:
        """The classes as `categories` of a COCO file.

        Raises:
            UsageError: If COCO's format has no place for predictions of this kind.
        """
        raise UsageError("COCO's format has no place for the class of a whole image: predictions.csv has it")

    def coco_annotations(self) -> list[dict[str, Any]]:
        """What was found as `annotations` of a COCO file, without `id` and `image_id`.

        Raises:
            UsageError: If COCO's format has no place for predictions of this kind.
        """
        raise UsageError("COCO's format has no place for the class of a whole image: predictions.csv has it")

    @property
    def rgb(self) -> Tensor:
        """The image as RGB (3, H, W), uint8; of other numbers of channels, the first three or the first."""
        return self.image[:3] if len(self.image) >= 3 else self.image[:1].expand(3, -1, -1)

    def figure(self) -> Figure:
        """The drawn prediction as a matplotlib figure with a title."""
        figure = Figure(layout="constrained")
        self._draw_into(figure)
        return figure

    def _draw_into(self, figure: Figure) -> None:
        drawn = self.draw()
        height, width = drawn.shape[1:]
        size = 7.0 / max(height, width)
        figure.set_size_inches(max(3.0, width * size), height * size + 0.5)
        axes = figure.add_subplot()
        axes.imshow(drawn.permute(1, 2, 0).numpy())
        axes.set_title(self.describe(), fontsize=9, wrap=True)
        axes.set_axis_off()

    def show(self) -> None:
        """Displays the figure: in a notebook below the cell, else in a window of matplotlib."""
        from matplotlib import pyplot

        if "inline" not in pyplot.get_backend() and pyplot.get_backend().lower() in ("agg", "pdf", "ps", "svg"):
            print(f"{self.describe()} (no display here: save(path) writes an image)")
            return
        figure = pyplot.figure(layout="constrained")
        self._draw_into(figure)
        pyplot.show()

    def save(self, path: str | Path) -> Path:
        """Writes the drawn prediction as an image file.

        Args:
            path: The file; its ending selects the format (`.png`, `.jpg`, …). Folders are created.

        Returns:
            The path.

        Raises:
            UsageError: If the format is unknown.
        """
        path = Path(path)
        _require_format(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.draw().permute(1, 2, 0).numpy()).save(path)
        return path

    def _write_drawn(self, folder: Path) -> str:
        path = folder / "images" / f"{self.name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.draw().permute(1, 2, 0).numpy()).save(path, quality=90)
        return str(path.relative_to(folder))

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png", dpi=80)
        return buffer.getvalue()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.name!r}: {self.describe()}>"


def _require_format(path: Path) -> None:
    known = Image.registered_extensions()
    if path.suffix.lower() not in known:
        raise UsageError(f"path is '{path}': its ending must be that of an image format, such as .png or .jpg")


@dataclass(eq=False, repr=False)
class ClassificationPrediction(Prediction):
    """The class of an image.

    Attributes:
        image: The image (C, H, W), uint8.
        name: File name, name within the data set, or a running number.
        probabilities: Probability of each class (K,), float32; their sum is 1.
        classes: Names of all K classes.
    """

    probabilities: Tensor
    classes: Sequence[str]

    @property
    def label(self) -> int:
        """Index of the most probable class, 0…K-1."""
        return int(self.probabilities.argmax())

    @property
    def class_name(self) -> str:
        """Name of the most probable class."""
        return self.classes[self.label]

    @property
    def probability(self) -> float:
        """Probability of the most probable class, 0…1."""
        return float(self.probabilities[self.label])

    @property
    def top5(self) -> list[tuple[str, float]]:
        """Names and probabilities of the five most probable classes (fewer if there are fewer), in descending order."""
        best = self.probabilities.topk(min(5, len(self.classes)))
        return [(self.classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    def draw(self) -> Tensor:
        """The image, upscaled by a whole factor if it has less than 480 px; the class stands in the figure's title."""
        return _upscaled(self.rgb)[0]

    def describe(self) -> str:
        """The three most probable classes."""
        return ", ".join(f"{name} {probability:.2f}" for name, probability in self.top5[:3])

    def save(self, path: str | Path) -> Path:
        """Writes the figure, with the class as its title, as an image file.

        Args:
            path: The file; its ending selects the format (`.png`, `.jpg`, …). Folders are created.

        Returns:
            The path.

        Raises:
            UsageError: If the format is unknown.
        """
        path = Path(path)
        _require_format(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure().savefig(path, dpi=100)
        return path

    def to_dict(self) -> dict[str, Any]:
        """`name`, `class`, `probability`, and `p(CLASS)` of every class."""
        every = {f"p({name})": round(p, 6) for name, p in zip(self.classes, self.probabilities.tolist(), strict=True)}
        return {"name": self.name, "class": self.class_name, "probability": round(self.probability, 6), **every}

    def write(self, folder: Path) -> dict[str, Any]:
        """Writes no file: the row says all.

        Args:
            folder: Not used.

        Returns:
            `to_dict()`.
        """
        return self.to_dict()


@dataclass(eq=False, repr=False)
class SegmentationPrediction(Prediction):
    """The class of every pixel of an image.

    Attributes:
        image: The image (C, H, W), uint8.
        name: File name, name within the data set, or a running number.
        mask: Class id of each pixel (H, W), uint8.
        class_names: Names of all K classes; a mask id is an index into them.
    """

    mask: Tensor
    class_names: Sequence[str]

    @property
    def shares(self) -> dict[str, float]:
        """Share of the pixels of each class that occurs, 0…1, by class name."""
        counts = torch.bincount(self.mask.reshape(-1), minlength=VOID + 1).tolist()
        return {name: counts[i] / self.mask.numel() for i, name in enumerate(self.class_names) if counts[i]}

    def colored(self) -> Image.Image:
        """The mask as a palette image (mode P) in the colours of Pascal VOC's development kit."""
        image = Image.fromarray(self.mask.numpy()).convert("P")
        image.putpalette(voc_palette())
        return image

    def overlay(self) -> Tensor:
        """The image with half-transparent class colours, at the image's own size.

        Returns:
            RGB (3, H, W), uint8. The background, if the first class is one, stays uncoloured.
        """
        present = self._foreground()
        drawn = self.rgb.clone()
        palette = np.array(voc_palette(), dtype=int).reshape(-1, 3)
        # A class with the colour black would look like a shadow.
        colors = [tuple(palette[i].tolist()) if palette[i].any() else (224, 224, 192) for i in present]
        # In strips of rows, as drawing takes 16 and more bytes for each pixel.
        rows = max(1, _STRIP // drawn.shape[2])
        for strip in (slice(start, start + rows) for start in range(0, drawn.shape[1] if present else 0, rows)):
            masks = torch.stack([self.mask[strip] == i for i in present])
            pixels = drawn[:, strip].contiguous()
            drawn[:, strip] = draw_segmentation_masks(pixels, masks, alpha=0.5, colors=colors)
        return drawn

    def _foreground(self) -> list[int]:
        """Ids of the classes that occur, without the background if the first class is one."""
        counts = torch.bincount(self.mask.reshape(-1), minlength=VOID + 1)[:VOID]
        present: list[int] = counts.nonzero().flatten().tolist()
        background = bool(self.class_names) and self.class_names[0].lower() in _BACKGROUNDS
        return [i for i in present if i or not background]

    def columns(self) -> dict[str, float]:
        """`share(CLASS)` of every class, 0…1."""
        shares = self.shares
        return {f"share({name})": round(shares.get(name, 0.0), 6) for name in self.class_names}

    def coco_categories(self) -> list[dict[str, Any]]:
        """The classes, with their mask ids as ids."""
        return [{"id": i, "name": name} for i, name in enumerate(self.class_names)]

    def coco_annotations(self) -> list[dict[str, Any]]:
        """The region of each class but the background, run-length encoded."""
        found = []
        for i in self._foreground():
            encoded = pycocotools.mask.encode(np.asfortranarray((self.mask == i).numpy()))
            found.append(
                {
                    "category_id": i,
                    "segmentation": {"size": list(encoded["size"]), "counts": encoded["counts"].decode()},
                    "area": int(pycocotools.mask.area(encoded)),
                    "bbox": pycocotools.mask.toBbox(encoded).tolist(),
                    "iscrowd": 0,
                }
            )
        return found

    def draw(self) -> Tensor:
        """The overlay, upscaled by a whole factor if it has less than 480 px: RGB (3, h, w), uint8."""
        return _upscaled(self.overlay())[0]

    def describe(self) -> str:
        """The four classes with the most pixels."""
        ordered = sorted(self.shares.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {100 * share:.0f} %" for name, share in ordered[:4])

    def to_dict(self) -> dict[str, Any]:
        """`name`, and `shares` of the pixels by class name."""
        return {"name": self.name, "shares": {name: round(share, 4) for name, share in self.shares.items()}}

    def write(self, folder: Path) -> dict[str, Any]:
        """Writes `masks/NAME.png` (class ids with a palette) and `overlays/NAME.jpg`, at the image's own size.

        Args:
            folder: The folder; subfolders are created.

        Returns:
            `to_dict()` with the paths of both files.
        """
        paths = {"mask": folder / "masks" / f"{self.name}.png", "overlay": folder / "overlays" / f"{self.name}.jpg"}
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        self.colored().save(paths["mask"])
        Image.fromarray(self.overlay().permute(1, 2, 0).numpy()).save(paths["overlay"], quality=90)
        row = self.to_dict()
        files = {key: str(path.relative_to(folder)) for key, path in paths.items()}
        return {"name": row.pop("name"), **files, **row}


@dataclass(eq=False, repr=False)
class DetectionPrediction(Prediction):
    """The objects in an image, in descending order of their scores.

    Attributes:
        image: The image (C, H, W), uint8.
        name: File name, name within the data set, or a running number.
        boxes: Boxes (n, 4): x1, y1, x2, y2 in px of the image, float32.
        labels: Class of each box (n,), 1…K.
        scores: Score of each box (n,), 0…1, or NaN for ground truth objects, which have no score.
        classes: Names of all K classes.
        min_score: Minimum score of the objects that are drawn and listed in `to_dict`.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    classes: Sequence[str]
    min_score: float = 0.0

    @property
    def class_names(self) -> list[str]:
        """Class name of each box."""
        return [self.classes[label - 1] for label in self.labels.tolist()]

    def above(self, min_score: float) -> DetectionPrediction:
        """The prediction without the objects of lower scores.

        Args:
            min_score: Minimum score that is kept, 0…1.
        """
        keep = ~(self.scores < min_score)
        boxes, labels, scores = self.boxes[keep], self.labels[keep], self.scores[keep]
        return dataclasses.replace(self, boxes=boxes, labels=labels, scores=scores, min_score=min_score)

    def draw(self) -> Tensor:
        """The objects of at least `min_score` on the image, upscaled if small: RGB (3, h, w), uint8."""
        image, factor, scale = _upscaled(self.rgb)
        shown = self.above(self.min_score)
        if not len(shown.boxes):
            return image
        order = shown.scores.argsort().tolist()  # the highest score is drawn last, and so lies on top
        names = [
            name if score != score else f"{name} {score:.2f}"  # NaN: an annotated object
            for name, score in zip(shown.class_names, shown.scores.tolist(), strict=True)
        ]
        colors = [_tab10(label) for label in shown.labels.tolist()]
        ordered = [colors[i] for i in order]
        drawn: Tensor = draw_bounding_boxes(
            image,
            shown.boxes[order] * factor,
            [names[i] for i in order],
            ordered,
            width=round(3 * scale),
            font=str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"),
            font_size=round(20 * scale),
            label_colors="white",
            label_background_colors=ordered,
            fill_labels=True,
        )
        return drawn

    def describe(self) -> str:
        """The number of objects of each class, of those of at least `min_score`."""
        counts = Counter(self.above(self.min_score).class_names)
        return ", ".join(f"{count} {name}" for name, count in counts.most_common(6)) or "no objects"

    def to_dict(self) -> dict[str, Any]:
        """`name`, the number of objects `found`, and `objects` with class, score and box, from `min_score` on."""
        shown = self.above(self.min_score)
        objects = [
            {"class": name, "score": round(score, 4), "box": [round(side, 2) for side in box]}
            for name, score, box in zip(shown.class_names, shown.scores.tolist(), shown.boxes.tolist(), strict=True)
        ]
        return {"name": self.name, "found": len(objects), "objects": objects}

    def coco_categories(self) -> list[dict[str, Any]]:
        """The classes, numbered from 1."""
        return [{"id": i, "name": name} for i, name in enumerate(self.classes, start=1)]

    def coco_annotations(self) -> list[dict[str, Any]]:
        """The objects of at least `min_score`, with their scores."""
        shown = self.above(self.min_score)
        return [
            {**_coco_box(box), "category_id": label, "score": round(score, 6)}
            for box, label, score in zip(
                shown.boxes.tolist(), shown.labels.tolist(), shown.scores.tolist(), strict=True
            )
        ]

    def write(self, folder: Path) -> dict[str, Any]:
        """Writes `images/NAME.jpg`, the image with boxes, classes and scores.

        Args:
            folder: The folder; subfolders are created.

        Returns:
            `to_dict()` with the path of the file as `image`.
        """
        row = self.to_dict()
        return {"name": row.pop("name"), "image": self._write_drawn(folder), **row}


@dataclass(eq=False, repr=False)
class KeypointPrediction(Prediction):
    """The keypoints of the people in an image, in descending order of their scores.

    Attributes:
        image: The image (C, H, W), uint8.
        name: File name, name within the data set, or a running number.
        keypoints: Keypoints (P, K, 3): x and y in px of the image, and a score in about 0…1, float64.
        scores: Score of each person (P,), float64.
        boxes: Box of each person (P, 4): x1, y1, x2, y2 in px of the image, float64.
        keypoint_names: Names of the K keypoints.
        skeleton: Pairs of connected keypoints, counted from 0.
        min_score: Minimum score of the people and keypoints that are drawn, and of the people in `to_dict`.
        category: What the people are, if they are something else.
    """

    keypoints: Tensor
    scores: Tensor
    boxes: Tensor
    keypoint_names: Sequence[str]
    skeleton: Sequence[tuple[int, int]] = field(default=())
    min_score: float = 0.0
    category: str = "person"

    def above(self, min_score: float) -> KeypointPrediction:
        """The prediction without the people of lower scores.

        Args:
            min_score: Minimum score that is kept, 0…1.
        """
        keep = self.scores >= min_score
        return dataclasses.replace(
            self, keypoints=self.keypoints[keep], scores=self.scores[keep], boxes=self.boxes[keep], min_score=min_score
        )

    def draw(self) -> Tensor:
        """The skeletons of at least `min_score`, each in its own colour, on the image: RGB (3, h, w), uint8."""
        image, factor, scale = _upscaled(self.rgb)
        people = self.above(self.min_score).keypoints
        for index in reversed(range(len(people))):  # the highest score is drawn last, and so lies on top
            person = people[index : index + 1]
            image = draw_keypoints(
                image,
                person[..., :2] * factor,
                connectivity=[(start, end) for start, end in self.skeleton],
                colors=_tab10(index),
                radius=round(4 * scale),
                width=round(3 * scale),
                visibility=person[..., 2] > self.min_score,
            )
        return image

    def describe(self) -> str:
        """The number of people of at least `min_score`."""
        count = len(self.above(self.min_score).scores)
        return f"{count} people" if self.category == "person" and count != 1 else f"{count} {self.category}"

    def to_dict(self) -> dict[str, Any]:
        """`name`, the number of `people` `found`, and each with score and keypoints by name, from `min_score` on."""
        shown = self.above(self.min_score)
        people = [
            {
                "score": round(score, 4),
                "keypoints": {
                    keypoint: [round(x, 2), round(y, 2), round(confidence, 4)]
                    for keypoint, (x, y, confidence) in zip(self.keypoint_names, person, strict=True)
                },
            }
            for person, score in zip(shown.keypoints.tolist(), shown.scores.tolist(), strict=True)
        ]
        return {"name": self.name, "found": len(people), "people": people}

    def coco_categories(self) -> list[dict[str, Any]]:
        """The category with its keypoints and skeleton."""
        skeleton = [[start + 1, end + 1] for start, end in self.skeleton]
        return [{"id": 1, "name": self.category, "keypoints": list(self.keypoint_names), "skeleton": skeleton}]

    def coco_annotations(self) -> list[dict[str, Any]]:
        """The people of at least `min_score`, with all their keypoints (visibility 2) and the scores."""
        shown = self.above(self.min_score)
        return [
            {
                **_coco_box(box),
                "category_id": 1,
                "keypoints": [number for x, y, _ in person for number in (round(x, 2), round(y, 2), 2)],
                "num_keypoints": len(person),
                "keypoint_scores": [round(confidence, 4) for _, _, confidence in person],
                "score": round(score, 6),
            }
            for box, person, score in zip(
                shown.boxes.tolist(), shown.keypoints.tolist(), shown.scores.tolist(), strict=True
            )
        ]

    def write(self, folder: Path) -> dict[str, Any]:
        """Writes `images/NAME.jpg`, the image with skeletons.

        Args:
            folder: The folder; subfolders are created.

        Returns:
            `to_dict()` with the path of the file as `image`.
        """
        row = self.to_dict()
        return {"name": row.pop("name"), "image": self._write_drawn(folder), **row}


def _coco_box(box: Sequence[float]) -> dict[str, Any]:
    """A box x1, y1, x2, y2 in the format of COCO's annotations."""
    left, top, right, bottom = (round(side, 2) for side in box)
    width, height = round(right - left, 2), round(bottom - top, 2)
    return {"bbox": [left, top, width, height], "area": round(width * height, 2), "iscrowd": 0}


def captioned(images: Sequence[Sequence[tuple[str, Tensor]]], height: float = 3.0) -> Figure:
    """Draws rows of images with captions.

    Args:
        images: Rows of captions and images (3, H, W), uint8.
        height: Height of a row in inches.
    """
    rows, columns = len(images), max(map(len, images), default=1)
    figure = Figure(figsize=(9, height * max(1, rows)), layout="constrained")
    for axes, row in zip(figure.subplots(max(1, rows), columns, squeeze=False), images, strict=True):
        for axis in axes:
            axis.set_axis_off()
        for axis, (caption, image) in zip(axes, row, strict=False):
            axis.imshow(image.permute(1, 2, 0).numpy())
            # At a stated height: to find one, matplotlib takes three times as long as it takes to draw.
            axis.set_title(caption, fontsize=8, y=1)
    return figure
