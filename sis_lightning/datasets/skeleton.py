"""The keypoints of a kind of object: their names, pairs, connections and deviations. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sis_lightning.datasets.constants import COCO_FLIP_PAIRS, COCO_KEYPOINTS, COCO_SIGMAS, COCO_SKELETON
from sis_lightning.errors import DataError, UsageError, nearest


@dataclass(frozen=True)
class Skeleton:
    """The K keypoints of a kind of object.

    Attributes:
        names: Name of each keypoint, in the order of the files.
        flip_pairs: Indices (left, right) of the keypoints that a horizontal flip exchanges.
        edges: Pairs of connected keypoints, counted from 0, for drawing.
        sigmas: Standard deviation of each keypoint, as a share of the object's size, for the object keypoint
            similarity (OKS).
        measured: Whether the deviations are known for these keypoints; else they are the mean of COCO's.
    """

    names: tuple[str, ...]
    flip_pairs: tuple[tuple[int, int], ...]
    edges: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...]
    measured: bool = True

    @classmethod
    def from_category(
        cls, names: Sequence[str], edges: Sequence[Sequence[int]] = (), sigmas: Sequence[float] = (), count: int = 0
    ) -> Skeleton:
        """The skeleton that a category of COCO's format states; what it does not state follows from the names.

        Keypoints named like COCO's have COCO's deviations. Pairs are names that differ in `left` and `right`, or in a
        separate `l` and `r`.

        Args:
            names: `keypoints` of the category; empty if it has none.
            edges: `skeleton` of the category, counted from 1.
            sigmas: Deviation of each keypoint; empty if they are not known.
            count: Number of keypoints of the annotations, if there are no names: 17 are taken for COCO's.

        Raises:
            DataError: If they contradict each other.
        """
        if not names and count == len(COCO_KEYPOINTS):
            names = COCO_KEYPOINTS
        names = tuple(names) or tuple(f"keypoint {number}" for number in range(1, count + 1))
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DataError(f"two of its keypoints are named '{twice[0]}'")
        for edge in edges:
            if len(edge) != 2 or not all(1 <= end <= len(names) for end in edge):
                raise DataError(f"its skeleton has {list(edge)}, must be pairs of 1…{len(names)}")
        if sigmas:
            check_sigmas(sigmas, len(names))
        known = dict(zip(COCO_KEYPOINTS, COCO_SIGMAS, strict=True))
        measured = bool(sigmas) or set(names) <= known.keys()
        mean = float(np.mean(COCO_SIGMAS))
        drawn = tuple((start - 1, end - 1) for start, end in edges)
        if names == COCO_KEYPOINTS:
            return cls(names, COCO_FLIP_PAIRS, drawn or COCO_SKELETON, tuple(sigmas) or COCO_SIGMAS)
        deviations = tuple(sigmas) or tuple(known[name] if measured else mean for name in names)
        return cls(names, tuple(_pairs_by_name(names)), drawn, deviations, measured)

    def changed(
        self, flip_pairs: Sequence[Sequence[str]] | None = None, sigmas: Sequence[float] | None = None
    ) -> Skeleton:
        """The same keypoints with other pairs or deviations.

        Args:
            flip_pairs: Names (left, right) of the keypoints that a horizontal flip exchanges; None for no change.
            sigmas: Deviation of each keypoint; None for no change.

        Raises:
            UsageError: If there is no such keypoint, or it is in two pairs, or there are not as many deviations as
                keypoints.
        """
        changed = self
        if sigmas is not None:
            try:
                check_sigmas(sigmas, len(self.names))
            except DataError as error:
                raise UsageError(str(error)) from None
            changed = dataclasses.replace(changed, sigmas=tuple(map(float, sigmas)), measured=True)
        if flip_pairs is not None:
            flat = [name for pair in flip_pairs for name in pair]
            for name in flat:
                if name not in self.names:
                    raise UsageError(f"flip_pairs has '{name}', which is no keypoint: {nearest(name, self.names)}")
            if any(len(pair) != 2 for pair in flip_pairs) or len(set(flat)) < len(flat):
                found = [list(pair) for pair in flip_pairs]
                raise UsageError(f"flip_pairs is {found}, must be pairs of different names")
            pairs = tuple((self.names.index(left), self.names.index(right)) for left, right in flip_pairs)
            changed = dataclasses.replace(changed, flip_pairs=pairs)
        return changed

    def notes(self) -> dict[str, str]:
        """What people should know if the keypoints are not COCO's, by a short label."""
        if self.names == COCO_KEYPOINTS:
            return {}
        pairs = ", ".join(f"{self.names[left]} and {self.names[right]}" for left, right in self.flip_pairs[:3])
        more = f" and {len(self.flip_pairs) - 3} more pairs" if len(self.flip_pairs) > 3 else ""
        notes = {"flip": f"exchanges {pairs}{more}" if pairs else "exchanges no keypoints (flip_pairs)"}
        if not self.measured:
            notes["sigmas"] = f"not known for these keypoints: {self.sigmas[0]:.3f}, the mean of COCO's, for each"
        return notes


def check_sigmas(sigmas: Sequence[float], count: int) -> None:
    """Checks the deviations of `count` keypoints.

    Raises:
        DataError: If they are not as many positive numbers.
    """
    if len(sigmas) != count or not all(math.isfinite(sigma) and sigma > 0 for sigma in sigmas):
        raise DataError(f"sigmas is {list(sigmas)}, must be {count} numbers above 0, one for each keypoint")


def _pairs_by_name(names: Sequence[str]) -> Iterator[tuple[int, int]]:
    place = {name: index for index, name in enumerate(names)}
    for name, index in place.items():
        mirrored = _mirrored(name)
        if mirrored != name and mirrored in place:
            yield index, place[mirrored]


_OPPOSITE = {"left": "right", "Left": "Right", "LEFT": "RIGHT", "l": "r", "L": "R"}
_LEFT = re.compile(r"left|Left|LEFT|(?<![A-Za-z])[lL](?![a-z])|(?<=[a-z])L$")


def _mirrored(name: str) -> str:
    """The name on the right side of a name on the left; the same if it does not say left."""
    return _LEFT.sub(lambda found: _OPPOSITE[found[0]], name)
