"""The data sets of tables, and what identifies the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataSet:
    """What a run is trained and tested on.

    Attributes:
        title: Name for people.
        kind: `official` for the published files, `synthetic`, or `stand-in` for real images in the place of others.
        test: Fingerprints (`SISDataModule.fingerprint`) of the accepted test files.
        train: Listings (`SISDataModule.listing`) of the accepted training files.
        train_images: Number of images of an epoch, of keypoints the number of persons; None if unknown.
        test_images: Number of images that a test scores, of keypoints those with persons; None if unknown.
    """

    title: str
    kind: Literal["official", "synthetic", "stand-in"]
    test: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    train_images: int | None = None
    test_images: int | None = None


#: The published data sets. Table specs name them, and cannot define them: no file decides what counts as official.
#:
#: `test` and `train` list the accepted fingerprints, which
#:   sis-lightning check-data --config tasks/NAME.yaml --data.root DIR --archives DIR
#: prints after comparing all files with the published archives. While a list is empty, no cell on that data can be
#: "reproduced". No published archive has SBD's masks as PNG files, and ImageNet's are archives of archives, so that
#: these two cannot be compared in this way.
#:
#: The numbers of images are those of the published splits: of COCO's training boxes the images with objects, of its
#: keypoints the persons with keypoints.
OFFICIAL: Mapping[str, DataSet] = {
    "cifar100": DataSet("CIFAR-100", "official", train_images=50_000, test_images=10_000),
    "coco_boxes": DataSet("COCO 2017", "official", train_images=117_266, test_images=5_000),
    "voc07_boxes": DataSet("Pascal VOC 2007 test", "official", train_images=16_551, test_images=4_952),
    "voc12_masks": DataSet("Pascal VOC 2012 val", "official", train_images=10_582, test_images=1_449),
    "coco_keypoints": DataSet("COCO 2017 keypoints", "official", train_images=149_813),
    "imagenet": DataSet("ImageNet", "official", train_images=1_281_167, test_images=50_000),
}
