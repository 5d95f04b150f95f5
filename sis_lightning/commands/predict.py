"""`sis-lightning predict`: predicts on images, and writes the predictions."""

from __future__ import annotations

from sis_lightning.commands.run_commands import run_parser, start


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = run_parser(
        "predict",
        "Predict on images, and write the predictions to predictions/ in the run's directory: a table as JSON and CSV, "
        "and the images with the predictions drawn in.",
        [
            ("predict --config tasks/seg_voc.yaml --config configs/demo.yaml", "on the val split"),
            ("predict --config tasks/det_coco.yaml --run_dir runs/boxes --data.predict_path photos", "on a folder"),
            (
                "predict --config tasks/kpt_coco.yaml --data.predict_path photos "
                "--data.person_boxes runs/boxes/predictions/predictions.json",
                "keypoints of the persons that the detector found",
            ),
        ],
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--data.predict_path", metavar="PATH", help="An image or a folder of images (default: the val split)."
    )
    images.add_argument(
        "--data.person_boxes",
        metavar="FILE",
        help="Keypoints: person boxes, as predict writes them for a detector or in COCO's results format.",
    )
    return start(parser, "predict", arguments)
