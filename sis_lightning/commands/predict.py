"""`sis-lightning predict`: predicts on images, and writes the predictions."""

from __future__ import annotations

from sis_lightning.commands.run_commands import run_parser, start


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = run_parser(
        "predict",
        "Predict on images. The predictions are written to predictions/ in the run's directory: as JSON, as CSV and, "
        "for all tasks but classification, drawn on the images.",
        [
            ("predict --config tasks/seg_voc.yaml --config configs/demo.yaml", "on the val split"),
            ("predict --config tasks/det_coco.yaml --run_dir runs/boxes --data.predict_path photos", "on a folder"),
            (
                "predict --config tasks/kpt_coco.yaml --data.predict_path photos "
                "--data.person_boxes runs/boxes/predictions/predictions.json",
                "keypoints of the persons that the previous command detected",
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
        help="For keypoints: file with person boxes, either predictions.json of predict for a detector, or results in "
        "COCO's format (default: the ground truth boxes, or with --data.predict_path each whole image as one person).",
    )
    images.add_argument(
        "--data.skip_bad",
        metavar="BOOL",
        help="If true, leave out images that cannot be read; they are named at the end (default: refuse all).",
    )
    images.add_argument(
        "--output", metavar="DIR", help="Folder for the predictions (default: predictions/ in the run's directory)."
    )
    images.add_argument(
        "--coco_json",
        metavar="BOOL",
        help="If true, also write coco.json: boxes, keypoints or run-length encoded regions in COCO's format.",
    )
    return start(parser, "predict", arguments)
