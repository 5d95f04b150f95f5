"""Names, numbers and colours of the published data sets, used by readers and writers. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

#: Name of the file in every folder of synthetic data; it holds the arguments that the data was made with.
SYNTHETIC_MARKER = "SYNTHETIC.json"

#: Pascal VOC's class names by mask id; 0 is the background.
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
#: Mask id of pixels that are not annotated (void).
VOID = 255

#: COCO's 80 categories by supercategory; the ids are in 1…90, and ten of these are not in use.
COCO_CATEGORIES = {
    "person": {1: "person"},
    "vehicle": {
        **{2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck"},
        **{9: "boat"},
    },
    "outdoor": {10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench"},
    "animal": {
        **{16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear"},
        **{24: "zebra", 25: "giraffe"},
    },
    "accessory": {27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase"},
    "sports": {
        **{34: "frisbee", 35: "skis", 36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat"},
        **{40: "baseball glove", 41: "skateboard", 42: "surfboard", 43: "tennis racket"},
    },
    "kitchen": {44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl"},
    "food": {
        **{52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot"},
        **{58: "hot dog", 59: "pizza", 60: "donut", 61: "cake"},
    },
    "furniture": {62: "chair", 63: "couch", 64: "potted plant", 65: "bed", 67: "dining table", 70: "toilet"},
    "electronic": {72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard", 77: "cell phone"},
    "appliance": {78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator"},
    "indoor": {
        **{84: "book", 85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier"},
        **{90: "toothbrush"},
    },
}
#: Names of a person's 17 keypoints, in the order of COCO's files.
COCO_KEYPOINTS = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
    *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
    *("left_knee", "right_knee", "left_ankle", "right_ankle"),
)
#: Indices (left, right) of the keypoints that a horizontal flip exchanges.
COCO_FLIP_PAIRS = ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16))
#: Pairs of keypoints that are connected, counted from 0 (in COCO's files from 1).
COCO_SKELETON = (
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9)),
    *((8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
)
#: Standard deviations of the annotators, as a share of the object's size, for the object keypoint similarity
#: (`kpt_oks_sigmas` of pycocotools' cocoeval.py).
COCO_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087),
    *(0.089, 0.089),
)
#: Mean and standard deviation of ImageNet's training images, RGB in 0…1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: Mean and standard deviation of CIFAR-100's training images, RGB in 0…1.
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)


def flip_order(count: int, pairs: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The order of keypoints after a horizontal flip.

    Args:
        count: Number of keypoints.
        pairs: Indices (left, right) of the keypoints that exchange places.

    Returns:
        For each keypoint, the index of the keypoint whose place it takes in the flipped image.
    """
    order = list(range(count))
    for left, right in pairs:
        order[left], order[right] = right, left
    return tuple(order)


def voc_palette() -> list[int]:
    """The colour map of VOC's devkit: 256 colours as [r0, g0, b0, r1, …], each 0…255."""
    label = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((label >> (3 * bit + channel)) & 1) << (7 - bit)
    return [int(value) for value in palette.ravel()]


#: File name endings (lower case) that are taken for images.
IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
