"""`sis-lightning check-data`: summarises a data set, and lists its defects."""

from __future__ import annotations

from pathlib import Path

from sis_lightning.commands.arguments import Parser, config_options, require_torch
from sis_lightning.config.compose import resolve


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code: 1 if the data has a defect."""
    parser = Parser(
        "check-data",
        "Summarise each split of a data set (images, sizes, objects, classes), and list every defect with its file: "
        "missing and truncated images, masks of another size, boxes outside of the image, unknown classes and so on.",
        [
            ("check-data --config tasks/det_coco.yaml --data.root /data/coco", ""),
            ("check-data --config tasks/seg_voc.yaml --data.root /data/voc --annotations-only", "in seconds"),
            (
                "check-data --config tasks/det_coco.yaml --data.root /data/coco --archives downloads",
                "verify that these are the official files",
            ),
        ],
        usage="--config FILE [options] [options of fit]",
        more="Further options are those of fit, such as --data.root. The exit code is 1 if there is any defect.",
    )
    parser.add_config(required=True)
    parser.add_argument("--annotations-only", action="store_true", help="Do not decode images and masks.")
    parser.add_argument(
        "--archives",
        type=Path,
        metavar="DIR",
        help="Folder that contains the published archives. Their checksums are verified, and each file of the data set "
        "is compared with the one in the archive.",
    )
    chosen, options = parser.parse_known_args(arguments)
    require_torch()
    from sis_lightning.datasets.check import check_data

    layers, rest = resolve(config_options(chosen.config, options))
    return min(check_data(layers, rest, pictures=not chosen.annotations_only, archives=chosen.archives), 1)
