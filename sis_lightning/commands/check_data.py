"""`sis-lightning check-data`: summarises a data set, and lists its defects."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from sis_lightning.commands.arguments import Parser, config_options, require_torch
from sis_lightning.commands.imports import quick_imports
from sis_lightning.errors import UsageError

if TYPE_CHECKING:
    from sis_lightning.datamodules import SISDataModule


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code: 1 if the data has a defect."""
    parser = Parser(
        "check-data",
        "Summarise each split of a data set (images, sizes, objects, classes), and list every defect with its file: "
        "missing or truncated images, masks that differ in size from their image, boxes outside the image, unknown "
        "classes and others.",
        [
            ("check-data --config tasks/det_coco.yaml --data.root /data/coco", ""),
            (
                "check-data --config tasks/seg_voc.yaml --data.root /data/voc --annotations-only",
                "check the annotations only, in seconds",
            ),
            (
                "check-data --config tasks/det_coco.yaml --data.root /data/coco --archives downloads",
                "verify that the files are the official ones",
            ),
        ],
        usage="--config FILE [options] [options of fit]",
        more="Further options are those of fit, such as --data.root. The exit code is 1 if there is any defect.",
    )
    parser.add_config(required=True)
    parser.add_argument(
        "--annotations-only",
        action="store_true",
        help="Check the annotations only, and do not decode images and masks.",
    )
    parser.add_argument(
        "--archives",
        type=Path,
        metavar="DIR",
        help="Folder that contains the archives as published, such as train2017.zip. Their checksums are verified, and "
        "each file of the data set is compared with the one in its archive.",
    )
    chosen, options = parser.parse_known_args(arguments)
    with quick_imports():
        require_torch()
        from sis_lightning.datasets.check import summarize_splits
        from sis_lightning.datasets.constants import SPLITS
        from sis_lightning.run.run import Run
    data = Run.from_arguments(config_options(chosen.config, options)).datamodule
    splits = {split: functools.partial(data.open, split) for split in SPLITS}
    count = 0
    for summary in summarize_splits(splits, decode=not chosen.annotations_only):
        print(summary, flush=True)
        count += len(summary.defects)
    print(f"{data.root}: {data.identity()}; " + (f"{count:,} defect(s)" if count else "no defects"))
    if chosen.archives is not None:  # whatever defects there are: published data sets have some, too
        print(_verification(data, chosen.archives), end="")
    return min(count, 1)


def _verification(data: SISDataModule, folder: Path) -> str:
    """Says that the data is the published one, with the hashes by which a table spec recognises it."""
    from sis_lightning.datasets.download import verify_files

    if not data.archives:
        raise UsageError(f"--archives: {type(data).__name__} is not of a published data set")
    data.setup("fit")
    data.setup("test")
    files = {path for split in ("train", "test") for path in data.datasets[split].files()}
    verify_files(files, data.home, data.archives, folder)
    return (
        f"verified by {', '.join(archive.file for archive in data.archives)}; for the data set in results/paper.yaml:\n"
        f"    test: [{data.fingerprint('test')}]\n    train: [{data.listing('train')}]\n"
    )
