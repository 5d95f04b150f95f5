"""What writers and readers of the published layouts must agree on; imports neither torch nor any other heavy thing."""

from __future__ import annotations

import numpy as np

#: Lies in every folder of synthetic data and says how it was made.
SYNTHETIC_MARKER = "SYNTHETIC.json"

#: Pascal VOC's classes by mask id.
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
#: The mask id of pixels that are not annotated.
VOID = 255


def voc_palette() -> list[int]:
    """The 256 colours of VOC's masks as [r0, g0, b0, r1, …]: the devkit's colour map."""
    label = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((label >> (3 * bit + channel)) & 1) << (7 - bit)
    return [int(value) for value in palette.ravel()]
