"""`sis-lightning evaluate`: scores a results file."""

from __future__ import annotations

from sis_lightning.commands.arguments import Parser

KINDS = ("bbox", "segm", "keypoints", "voc07", "voc12")
_OF_COCO = ("evaluator", "max_detections", "category", "sigmas")


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser(
        "evaluate",
        "Score the detections, instance masks or keypoints of any program, in the results format of COCO or of the "
        "Pascal VOC devkit. The metrics are computed by the same code as in sis-lightning test.",
        [
            ("evaluate --type bbox --truth instances_val2017.json --results detections.json", ""),
            ("evaluate --type voc07 --truth VOCdevkit/VOC2007 --split test --results comp4", ""),
        ],
    )
    parser.add_argument(
        "--type",
        required=True,
        choices=KINDS,
        help="bbox, segm, keypoints: the COCO metrics. voc07: average precision of Pascal VOC 2007 (mean precision at "
        "11 recalls). voc12: that of Pascal VOC 2010 and later (area under the precision-recall curve).",
    )
    parser.add_argument(
        "--truth",
        "--ground-truth",
        required=True,
        metavar="PATH",
        help="Ground truth: a COCO annotation file, or a folder such as VOCdevkit/VOC2007, which contains "
        "Annotations/.",
    )
    parser.add_argument(
        "--results",
        required=True,
        metavar="PATH",
        help="Results: a COCO results file, or a folder with one file per class, CLASS.txt or "
        "comp4_det_SPLIT_CLASS.txt.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Print JSON with all digits; null is the value of a metric for which there are no ground truth objects.",
    )
    coco = parser.add_argument_group("COCO")
    coco.add_argument(
        "--evaluator",
        choices=("auto", "pycocotools", "faster-coco-eval"),
        help="Library that computes COCO's metrics; both give the same values. auto is faster-coco-eval if it is "
        "installed, else pycocotools (default: auto).",
    )
    coco.add_argument(
        "--max-detections",
        type=int,
        metavar="N",
        help="For boxes and masks: number of detections per image and class that count (default: 100, as COCO's).",
    )
    coco.add_argument(
        "--category",
        metavar="NAME",
        help="For keypoints: the only category that is scored (default: all that have keypoints).",
    )
    coco.add_argument(
        "--sigmas",
        nargs="+",
        type=float,
        metavar="S",
        help="For keypoints: standard deviation of each keypoint for the object keypoint similarity (default: those of "
        "the annotation file, or COCO's; for keypoints of unknown names the mean of COCO's).",
    )
    voc = parser.add_argument_group("Pascal VOC")
    voc.add_argument(
        "--split", metavar="NAME", help="Name of an image list in ImageSets/Main (default: all annotated images)."
    )
    voc.add_argument(
        "--voc-rule",
        dest="rule",
        choices=("devkit", "toolkit"),
        help="devkit (default): difficult objects are ignored, and the IoU of a match is above the threshold. toolkit "
        "(of Padilla et al.): difficult objects count like all others, and the IoU may equal the threshold.",
    )
    voc.add_argument("--iou", type=float, metavar="T", help="IoU threshold (default: 0.5).")
    voc.add_argument("--classes", nargs="+", metavar="NAME", help="Class names (default: the 20 classes of VOC).")
    chosen = parser.parse_args(arguments)
    of_voc = chosen.type.startswith("voc")
    options = {key: getattr(chosen, key) for key in (*_OF_COCO, "split", "rule", "iou", "classes")}
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if (key in _OF_COCO) == of_voc:
            option = "--voc-rule" if key == "rule" else f"--{key.replace('_', '-')}"
            parser.error(f"{option} belongs to {'COCO' if of_voc else 'Pascal VOC'}, and --type is {chosen.type}")
    for key in given:
        of_keypoints = key in ("category", "sigmas")
        if (of_keypoints or key == "max_detections") and of_keypoints != (chosen.type == "keypoints"):
            what = "keypoints" if of_keypoints else "bbox and segm"
            parser.error(f"--{key.replace('_', '-')} belongs to {what}, and --type is {chosen.type}")
    if "evaluator" in given:
        given["backend"] = given.pop("evaluator")
    from sis_lightning.evaluation.files import evaluate

    evaluation = evaluate(chosen.truth, chosen.results, chosen.type, **given)
    print(evaluation.to_json() if chosen.json else evaluation.to_table(), end="")
    return 0
