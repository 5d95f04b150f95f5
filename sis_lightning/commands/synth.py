"""`sis-lightning synth`: writes synthetic data sets in the real formats."""

from __future__ import annotations

from pathlib import Path

from sis_lightning.commands.arguments import Parser


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser(
        "synth",
        "Draw images of shapes and stick figures with exact annotations, and write them in the formats of CIFAR-100, "
        "Pascal VOC and COCO. The same arguments always write the same files.",
        [("synth data/synthetic", ""), ("synth data/more --images 200 --size 96 --kinds voc coco", "")],
    )
    parser.add_argument("root", metavar="ROOT", help="New or empty folder to write to.")
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        metavar="N",
        help="Number of images of VOC 2012 and of COCO; VOC 2007 gets half as many, CIFAR ten times as many "
        "(default: %(default)s).",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=256,
        metavar="PX",
        help="Longer side of the images of VOC and COCO in px (default: %(default)s).",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Random seed (default: %(default)s).")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=["cifar", "voc", "coco", "imagenet"],
        metavar="KIND",
        help="Formats to write: cifar, voc, coco, imagenet (default: all).",
    )
    parser.add_argument(
        "--min-object",
        type=int,
        default=8,
        metavar="PX",
        help="Minimum length in px of the longer side of an object's visible part, in VOC and COCO (default: "
        "%(default)s).",
    )
    parser.add_argument(
        "--rotation",
        type=float,
        default=180,
        metavar="DEGREES",
        help="Maximum rotation of a shape in degrees, in either direction (default: %(default)s).",
    )
    chosen = parser.parse_args(arguments)
    from sis_lightning.datasets.synthetic import write_synthetic

    sheet = write_synthetic(
        Path(chosen.root),
        images=chosen.images,
        size=chosen.size,
        seed=chosen.seed,
        kinds=chosen.kinds,
        min_object=chosen.min_object,
        rotation=chosen.rotation,
    )
    print(f"wrote {', '.join(chosen.kinds)} to {chosen.root}; {sheet} shows some of the images")
    return 0
