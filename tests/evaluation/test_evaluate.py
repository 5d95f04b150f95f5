"""COCO's and VOC's metrics: against published numbers, between libraries, against plain loops, and on bad input."""

from __future__ import annotations

import builtins
import copy
import json
import math
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as masks
from pycocotools.cocoeval import COCOeval

from sis_lightning.datasets.annotations import Annotations
from sis_lightning.datasets.coco_reader import read_coco
from sis_lightning.datasets.paths import PathArray
from sis_lightning.errors import UsageError
from sis_lightning.evaluation.coco import RESULT_KEYS, COCOGroundTruth
from sis_lightning.evaluation.voc import VOCGroundTruth, read_comp4, write_comp4

EVALUATORS = ("pycocotools", "faster-coco-eval")
KEY = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


@pytest.fixture(scope="session")
def reference(shared) -> Path:
    """Cases that others published metrics for."""
    folder = shared.parent / "reference"
    if not folder.is_dir():
        pytest.skip("no published cases here: SIS_SHARED has no folder reference/")
    return folder


def published(reference: Path, kind: str) -> tuple[Path, Path, dict[str, float]]:
    if kind == "keypoints":
        folder = reference / "keypoints_fce"
        expected = json.loads((folder / "expected.json").read_text())
        return folder / "gt_dataset.json", folder / "dt_dataset.json", expected
    folder = reference / "cocoapi_fake100"
    expected = json.loads((folder / "expected.json").read_text())[kind]
    return folder / "instances_val2014_100.json", folder / f"instances_val2014_fake{kind}100_results.json", expected


def ground_truth(content, kind: str, evaluator: str = "pycocotools") -> COCOGroundTruth:
    return COCOGroundTruth(read_coco(content, kind=kind), kind, evaluator)


def scored(command, *arguments: object) -> dict[str, float]:
    result = command("evaluate", *arguments, "--json")
    assert result.code == 0, result.err
    metrics = json.loads(result.out)["metrics"]
    return {name: math.nan if value is None else value for name, value in metrics.items()}


# COCO


@pytest.mark.parametrize("kind", KEY)
@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_coco_is_as_published(command, reference, kind, evaluator):
    truth, results, expected = published(reference, kind)
    files = ("--truth", truth, "--results", results, "--type", kind, "--evaluator", evaluator)
    metrics = scored(command, *files)
    assert [name for name in metrics if "/" not in name] == list(expected)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    table = command("evaluate", *files)
    assert table.code == 0
    assert all(f"{value:.4f}" in table.out for value in expected.values())
    assert "Accumulating" not in table.out


@pytest.mark.parametrize("kind", KEY)
def test_backends_agree_on_published_cases_and_do_not_change_rows(reference, kind):
    truth, results, _ = published(reference, kind)
    content, rows = json.loads(truth.read_bytes()), json.loads(results.read_bytes())
    before = copy.deepcopy((content, rows))
    known = [ground_truth(content, kind, evaluator) for evaluator in EVALUATORS]
    for image_ids in (None, known[0].image_ids[::2]):
        one, other = (truth.score(rows, image_ids) for truth in known)
        assert one == pytest.approx(other, abs=1e-12, nan_ok=True)
        # Nothing that one call leaves behind changes the next.
        assert known[0].score(rows, image_ids) == pytest.approx(one, abs=0, nan_ok=True)
    assert (content, rows) == before


def person(rng: np.random.Generator, visible: bool = True) -> list[float]:
    keypoints = np.concatenate([rng.uniform(0, 100, (17, 2)), rng.integers(0, 3, (17, 1))], axis=1)
    return (keypoints if visible else keypoints * [1, 1, 0]).ravel().tolist()


def blob(rng: np.random.Generator) -> dict[str, object]:
    mask = np.zeros((60, 80), dtype=np.uint8, order="F")
    y, x = rng.integers(0, 40, 2)
    mask[y : y + rng.integers(1, 40), x : x + rng.integers(1, 40)] = 1
    rle = masks.encode(mask)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def random_case(seed: int) -> tuple[dict[str, object], list[dict[str, object]]]:
    """A ground truth with crowds, absent classes and images without objects, and detections with equal scores."""
    rng = np.random.default_rng(seed)
    images = [{"id": 3 * i, "width": 80, "height": 60} for i in range(int(rng.integers(1, 6)))]

    def row(**more):
        box = np.append(rng.uniform(0, 50, 2), rng.choice([4, 40, 120], 2) * rng.uniform(0.8, 1.2, 2)).tolist()
        shape = {"bbox": box, "segmentation": blob(rng), "keypoints": person(rng, rng.random() < 0.8)}
        image = images[int(rng.integers(len(images)))]["id"]
        return {"image_id": image, "category_id": int(rng.integers(1, 4)), **shape, **more}

    truth = []
    for number in range(int(rng.integers(0, 12))):
        entry = row(id=number, iscrowd=int(rng.random() < 0.2))
        truth.append({**entry, "area": entry["bbox"][2] * entry["bbox"][3]})
    found = [row(score=float(rng.integers(0, 6)) / 5) for _ in range(int(rng.integers(0, 12)))]
    for entry in truth:
        if rng.random() < 0.7:
            near = [value + float(rng.normal(0, 1)) * (place % 3 < 2) for place, value in enumerate(entry["keypoints"])]
            box = [max(value + float(rng.normal(0, 2)), 0.0) for value in entry["bbox"]]
            same = {key: entry[key] for key in ("image_id", "category_id", "segmentation")}
            found.append({**same, "bbox": box, "keypoints": near, "score": float(rng.random())})
    categories = [{"id": number, "name": str(number)} for number in (1, 2, 3, 7)]
    return {"images": images, "categories": categories, "annotations": truth}, found


@pytest.mark.parametrize("evaluator", EVALUATORS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(list(KEY)))
def test_the_ap_of_a_class_is_that_of_pycocotools_for_it_alone(evaluator, seed, kind):
    content, rows = random_case(seed)
    known = ground_truth(content, kind, evaluator)
    found = known.score(rows)
    theirs = known._truth if evaluator == "pycocotools" else ground_truth(content, kind)._truth
    for number in (1, 2, 3, 7):
        oracle = COCOeval(theirs, theirs.loadRes(known_rows(known, rows)), kind) if rows else None
        if oracle is None:
            continue
        oracle.params.catIds = [number]
        oracle.evaluate()
        oracle.accumulate()
        oracle.summarize()
        wanted = oracle.stats[0] if oracle.stats[0] >= 0 else math.nan
        assert found[f"AP/{number}"] == pytest.approx(wanted, abs=1e-12, nan_ok=True)


def known_rows(known: COCOGroundTruth, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Results with the numbers that the ground truth gives its images, from 1 in the order of their ids."""
    numbers = {image: number for number, image in enumerate(known.image_ids, start=1)}
    key = RESULT_KEYS[known.kind]
    keys = ("category_id", "score", key)
    return [{"image_id": numbers[row["image_id"]], **{name: row[name] for name in keys}} for row in rows]


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_more_detections_than_a_hundred_count_if_asked_for(command, evaluator):
    # 300 objects in a row, of which COCO's first 100 detections can find a third.
    boxes = [[4.0 * place, 5.0, 3.0, 3.0] for place in range(300)]
    image = {"id": 1, "file_name": "a.jpg", "width": 1200, "height": 20}
    truth = [{"id": 1 + i, "image_id": 1, "category_id": 1, "bbox": box, "area": 9.0} for i, box in enumerate(boxes)]
    content = {"images": [image], "categories": [{"id": 1, "name": "cell"}], "annotations": truth}
    rows = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 1 - i / 1000} for i, box in enumerate(boxes)]
    Path("truth.json").write_text(json.dumps(content))
    Path("rows.json").write_text(json.dumps(rows))
    line = ["--type", "bbox", "--truth", "truth.json", "--results", "rows.json", "--evaluator", evaluator]
    usual, more = scored(command, *line), scored(command, *line, "--max-detections", 300)
    assert usual["AR100"] == pytest.approx(1 / 3)
    assert usual["AP"] == pytest.approx(34 / 101)  # precision 1 at recalls 0, 0.01 … 0.33
    assert "AR100" not in more
    assert (more["AP"], more["AR300"], more["AR10"]) == (1, 1, pytest.approx(10 / 300))
    assert "≤ 300" in command("evaluate", *line, "--max-detections", 300).out
    few = command("evaluate", *line, "--max-detections", 10)
    assert few.code == 2
    assert "max_detections is 10, must be above 10" in few.err
    wrong = command("evaluate", *line[2:], "--type", "keypoints", "--max-detections", 300)
    assert wrong.code == 2
    assert "--max-detections belongs to bbox and segm" in wrong.err


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(list(KEY)))
def test_backends_agree_on_random_cases(seed, kind):
    content, rows = random_case(seed)
    one, other = (ground_truth(content, kind, evaluator).score(rows) for evaluator in EVALUATORS)
    assert one == pytest.approx(other, abs=1e-12, nan_ok=True)
    assert all(math.isnan(value) or 0 <= value <= 1 for value in one.values())


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("kind", KEY)
def test_metrics_are_defined_without_objects_or_detections(kind, evaluator):
    content, rows = random_case(2)
    truth = ground_truth(content, kind, evaluator)
    assert rows
    assert len(truth.annotations.labels)
    assert truth.score([])["AP"] == 0
    assert all(math.isnan(value) for value in truth.score(rows, []).values())
    for part in ("annotations", "images"):
        emptied = {**content, "annotations": [], part: []}
        assert all(math.isnan(value) for value in ground_truth(emptied, kind, evaluator).score([]).values())
    assert all(
        math.isnan(v) for v in ground_truth({**content, "annotations": []}, kind, evaluator).score(rows).values()
    )
    no_category = ground_truth({"images": content["images"], "categories": [], "annotations": []}, kind, evaluator)
    assert math.isnan(no_category.score([])["AP"])
    unlabelled = COCOGroundTruth(
        read_coco({key: content[key] for key in ("images", "categories")}, kind=kind), kind, evaluator
    )
    assert not unlabelled.annotated
    assert unlabelled.score(rows) == {}


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_persons_without_a_visible_keypoint_are_not_to_be_found(evaluator):
    rng = np.random.default_rng(0)
    hidden = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500.0, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [{**hidden, "keypoints": person(rng, visible=False)}],
    }
    seen = {"image_id": 1, "category_id": 1, "score": 0.5, "keypoints": person(rng)}
    assert all(math.isnan(value) for value in ground_truth(content, "keypoints", evaluator).score([seen]).values())
    content["annotations"].append({**hidden, "id": 2, "keypoints": [50.0, 50.0, 2] * 17})
    right = {**seen, "keypoints": [50.0, 50.0, 1] * 17}
    assert ground_truth(content, "keypoints", evaluator).score([right])["AP"] == pytest.approx(1)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_an_object_with_id_0_can_be_found(evaluator):
    box = [10, 10, 40, 40]
    content = {
        "images": [{"id": 0}],
        "categories": [{"id": 0, "name": "thing"}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": box, "area": 1600}],
    }
    row = {"image_id": 0, "category_id": 0, "score": 1.0, "bbox": box}
    assert ground_truth(content, "bbox", evaluator).score([row])["AP"] == pytest.approx(1)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_a_box_beside_a_mask_does_not_decide_its_size(evaluator):
    content, rows = random_case(2)
    truth = ground_truth(content, "segm", evaluator)
    small, medium = ([{**row, "bbox": [0, 0, side, side]} for row in rows] for side in (1, 50))
    assert truth.score(small) == pytest.approx(truth.score(medium), abs=0, nan_ok=True)


def test_missing_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("faster_coco_eval"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r'pip install "sis-lightning\[fast\]"'):
        ground_truth({"images": [], "categories": []}, "bbox", "faster-coco-eval")


def coco_files(tmp_path: Path, kind: str, change) -> tuple[str, ...]:
    """Options for sound files after `change(ground truth, results)`, which may return other results."""
    content, rows = random_case(2)
    rows = [{key: row[key] for key in ("image_id", "category_id", "score", KEY[kind])} for row in rows]
    rows = change(content, rows) or rows
    (tmp_path / "gt.json").write_text(json.dumps(content))
    (tmp_path / "dt.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return ("--truth", str(tmp_path / "gt.json"), "--results", str(tmp_path / "dt.json"), "--type", kind)


def put(part: str, place: int, **values: object):
    """A change of one entry; None takes a key away."""

    def change(content, rows):
        entry = (rows if part == "results" else content[part])[place]
        entry.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del entry[key]

    return change


def both(*changes):
    def change(content, rows):
        for one in changes:
            one(content, rows)

    return change


def drop(content, rows):
    content.pop("annotations")


BAD_COCO = {
    "results are an object": ("bbox", lambda c, r: {"annotations": r}, ["dt.json: not a list of results", "bbox"]),
    "results are not JSON": ("bbox", lambda c, r: "[{", ["dt.json: not valid JSON"]),
    "an entry is a number": ("bbox", lambda c, r: [r[0], 7], ["dt.json: entry 1 is 7"]),
    "no score": ("bbox", put("results", 1, score=None), ["entry 1 has no 'score'", "'bbox'"]),
    "boxes for masks": ("segm", lambda c, r: [{**r[0], "segmentation": [0, 0, 4, 4]}], ["entry 0", "pycocotools.mask"]),
    "unknown image": (
        "bbox",
        put("results", 2, image_id=1),
        ["entry 2: image_id 1 is not an image of the ground truth"],
    ),
    "image as text": ("bbox", put("results", 2, image_id="0"), ["entry 2: image_id '0' is not"]),
    "image as list": ("bbox", put("results", 2, image_id=[0]), ["entry 2: image_id [0] is not"]),
    "labels from 0": ("bbox", put("results", 0, category_id=0), ["entry 0: category_id 0", "its 4 are in 1…7"]),
    "NaN score": ("bbox", put("results", 3, score=math.nan), ["entry 3: score is nan, not a finite number"]),
    "infinite score": ("keypoints", put("results", 3, score=math.inf), ["entry 3: score is inf"]),
    "score as text": ("bbox", put("results", 3, score="0.5"), ["entry 3: score is '0.5', not a finite number"]),
    "NaN box": ("bbox", put("results", 3, bbox=[0, 0, math.nan, 1]), ["entry 3: bbox is [0, 0, nan, 1], not 4 finite"]),
    "three numbers": ("bbox", put("results", 3, bbox=[0, 0, 1]), ["entry 3: bbox is [0, 0, 1] (3 values), not 4"]),
    "box as texts": ("bbox", put("results", 3, bbox=list("1234")), ["entry 3: bbox is ['1', '2', '3', '4'], not 4"]),
    "corners, not sizes": ("bbox", put("results", 3, bbox=[9, 9, 5, -5]), ["entry 3: bbox [9, 9, 5, -5]", "negative"]),
    "huge number": ("bbox", put("results", 3, score=10**400), ["entry 3: score is 1000", "not a finite number"]),
    "sixteen keypoints": (
        "keypoints",
        put("results", 0, keypoints=[0.0] * 48),
        ["entry 0: keypoints", "48 values", "51"],
    ),
    "NaN keypoint": ("keypoints", put("results", 0, keypoints=[math.nan] * 51), ["entry 0: keypoints", "51 finite"]),
    "other mask size": (
        "segm",
        put("results", 1, segmentation={"size": [80, 60], "counts": "0"}),
        ["entry 1: segmentation's size is [80, 60]", "[60, 80]"],
    ),
    "mask cut off": (
        "segm",
        put("results", 1, segmentation={"size": [60, 80], "counts": "P"}),
        ["entry 1: segmentation's counts are cut off"],
    ),
    "mask beyond image": (
        "segm",
        put("results", 1, segmentation={"size": [60, 80], "counts": "0oooo0"}),
        ["entry 1: segmentation's counts are damaged", "of 4800"],
    ),
    "ground truth is a list": ("bbox", lambda c, r: c.clear(), ["gt.json: not an annotation file of COCO"]),
    "no annotations": ("bbox", drop, ["gt.json has no 'annotations'", "server"]),
    "annotations null": ("bbox", lambda c, r: c.update(annotations=None), ["gt.json: 'annotations' is not a list"]),
    "id twice": ("bbox", put("annotations", 1, id=0), ["gt.json, annotation 0 (entry 1): this id is given twice"]),
    "image twice": (
        "bbox",
        lambda c, r: c["images"].append(c["images"][0]),
        ["gt.json, image 0 (entry ", "this id is given twice"],
    ),
    "image named": ("bbox", put("images", 0, id="a"), ["entry 0 of 'images': the id is 'a', not a whole number"]),
    "area 0": ("keypoints", put("annotations", 1, area=0), ["entry 1 of 'annotations'", "area is 0"]),
    "crowd as text": ("bbox", put("annotations", 1, iscrowd="0"), ["entry 1 of 'annotations'", "iscrowd is '0'"]),
    "area as text": ("bbox", put("annotations", 1, area="9"), ["entry 1 of 'annotations'", "area is not a finite"]),
    "NaN ground truth": (
        "bbox",
        put("annotations", 1, bbox=[math.nan] * 4),
        ["entry 1 of 'annotations'): the box is not four finite numbers"],
    ),
    "lost image": (
        "bbox",
        put("annotations", 1, image_id=1),
        ["entry 1 of 'annotations'): its image 1 is not listed under 'images'"],
    ),
    "lost class": (
        "bbox",
        put("annotations", 1, category_id=5),
        ["entry 1 of 'annotations'): unknown category 5: it is not listed under"],
    ),
    "no masks": ("segm", put("annotations", 1, segmentation=[]), ["entry 1 of 'annotations'): segmentation is []"]),
    "a line": (
        "segm",
        put("annotations", 1, segmentation=[[0, 0, 1, 1]]),
        ["entry 1 of 'annotations'): segmentation's polygon [0, 0, 1"],
    ),
    "short RLE": (
        "segm",
        put("annotations", 1, segmentation={"size": [60, 80], "counts": [3, 4]}),
        ["entry 1 of 'annotations'): segmentation's RLE is not of an image of 60×80"],
    ),
    "no sizes": ("segm", put("images", 0, height=None), ["gt.json, image 0: width or height is missing"]),
    "no keypoints": (
        "keypoints",
        put("annotations", 0, keypoints=None),
        ["entry 0 of 'annotations'): keypoints are not 17 × (x, y, v)"],
    ),
}


@pytest.mark.parametrize("case", BAD_COCO)
def test_bad_coco_files_are_named(command, tmp_path, case):
    kind, change, words = BAD_COCO[case]
    result = command("evaluate", *coco_files(tmp_path, kind, change))
    assert result.code == 1, result.err
    assert len(result.err.splitlines()) <= 5
    assert not result.out
    for word in words:
        assert word in result.err, (word, result.err)


def test_numbers_of_any_json_type_are_read(command, tmp_path):
    plain = coco_files(tmp_path, "bbox", lambda c, r: None)
    expected = scored(command, *plain)
    whole = coco_files(tmp_path, "bbox", put("results", 0, image_id=float(random_case(2)[1][0]["image_id"])))
    assert scored(command, *whole) == pytest.approx(expected, abs=0, nan_ok=True)
    huge = coco_files(tmp_path, "bbox", put("results", 0, bbox=[0, 0, 10**30, 1]))
    assert command("evaluate", *huge).code == 0


def test_json_has_null_for_metrics_without_objects(command, tmp_path):
    result = command("evaluate", *coco_files(tmp_path, "bbox", lambda c, r: c.update(annotations=[])), "--json")
    report = json.loads(result.out, parse_constant=pytest.fail)
    assert set(report["metrics"].values()) == {None}
    assert (report["objects"], report["detections"]) == (0, len(random_case(2)[1]))
    table = command("evaluate", *coco_files(tmp_path, "bbox", lambda c, r: c.update(annotations=[])))
    assert "– nothing to find" in table.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--type", "bbox", "--voc-rule", "devkit"], "--voc-rule belongs to Pascal VOC, and --type is bbox"),
        (["--type", "segm", "--iou", "0.5"], "--iou belongs to Pascal VOC"),
        (["--type", "keypoints", "--classes", "person"], "--classes belongs to Pascal VOC"),
        (["--type", "bbox", "--split", "val"], "--split belongs to Pascal VOC"),
        (["--type", "voc07", "--evaluator", "pycocotools"], "--evaluator belongs to COCO, and --type is voc07"),
        (["--type", "voc12", "--iou", "0"], "iou is 0, must be above 0"),
        (["--type", "voc12", "--iou", "nan"], "iou is nan, must be above 0"),
        (["--type", "voc12", "--classes", "cat", "cat"], "classes names one twice"),
        (["--type", "boxes"], "invalid choice: 'boxes'"),
        ([], "--type"),
    ],
)
def test_wrong_arguments(command, arguments, words):
    result = command("evaluate", "--truth", "gt.json", "--results", "dt.json", *arguments)
    assert result.code == 2
    assert words in result.err
    assert len(result.err.splitlines()) <= 5


def test_missing_files(command, tmp_path):
    options = ("evaluate", "--type", "bbox", "--results", "dt.json", "--truth")
    for truth, words in (("gt.json", "gt.json does not exist"), (tmp_path, "Is a directory")):
        result = command(*options, truth)
        assert result.code == 1
        assert words in result.err


@pytest.mark.parametrize(
    ("backend", "unwanted"), [("pycocotools", ("torch", "matplotlib", "faster_coco_eval")), ("auto", ("torch",))]
)
def test_neither_torch_nor_the_other_library_is_imported(backend, unwanted):
    script = (
        "import sys, sis_lightning.commands.main, sis_lightning.evaluation.files, sis_lightning.bench.evaluators;"
        "content = {'images': [], 'categories': [], 'annotations': []};"
        f"sis_lightning.evaluation.files.evaluate(content, [], 'bbox', backend='{backend}');"
        f"print(*{set(unwanted)} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_faster_library_is_taken_where_it_is_installed(monkeypatch):
    truth = read_coco({"images": [], "categories": [], "annotations": []}, kind="bbox")
    assert COCOGroundTruth(truth, "bbox").backend == "faster-coco-eval"
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert COCOGroundTruth(truth, "bbox").backend == "pycocotools"


# VOC

NAMES = ("ant", "bee", "wild_bee")


def voc_truth(objects, images: int = 4, names: tuple[str, ...] = NAMES) -> Annotations:
    """Annotations of (image, label, box, difficult)."""
    return Annotations(
        Path("VOC"),
        names,
        tuple(range(len(names))),
        PathArray(f"im{i}.jpg" for i in range(images)),
        [f"im{i}" for i in range(images)],
        np.full((images, 2), 50),
        np.array([item[0] for item in objects], dtype=np.int64),
        np.array([item[2] for item in objects], dtype=np.float64).reshape(-1, 4),
        np.array([item[1] for item in objects], dtype=np.int64),
        np.array([item[3] for item in objects], dtype=np.bool_),
    )


def voc_row(image: int, label: int, box, score: float) -> dict[str, object]:
    x1, y1, x2, y2 = box
    return {"image_id": f"im{image}", "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}


def plain_voc_ap(objects, rows, label: int, rule: str, iou: float) -> tuple[float, float]:
    """The loop of the devkit's Python port, on inclusive pixel coordinates counted from 1."""
    truth = defaultdict(list)
    for image, known, (x1, y1, x2, y2), difficult in objects:
        if known == label:
            truth[f"im{image}"].append({"box": (x1 + 1, y1 + 1, x2, y2), "difficult": difficult, "taken": False})
    positives = sum(not (item["difficult"] and rule == "devkit") for items in truth.values() for item in items)
    if positives == 0:
        return math.nan, math.nan
    tp, fp = [], []
    for row in sorted((row for row in rows if row["category_id"] == label), key=lambda row: -row["score"]):
        x, y, w, h = row["bbox"]
        xmin, ymin, xmax, ymax = x + 1, y + 1, x + w, y + h
        largest, best = -math.inf, None
        for item in truth[row["image_id"]]:
            a, b, c, d = item["box"]
            iw, ih = min(xmax, c) - max(xmin, a) + 1, min(ymax, d) - max(ymin, b) + 1
            if iw > 0 and ih > 0:
                union = (xmax - xmin + 1) * (ymax - ymin + 1) + (c - a + 1) * (d - b + 1) - iw * ih
                if iw * ih / union > largest:
                    largest, best = iw * ih / union, item
        hit = 0
        if largest > iou or (largest == iou and rule == "toolkit"):
            if rule == "devkit" and best["difficult"]:
                continue
            hit = int(not best["taken"])
            best["taken"] = True
        tp.append(hit)
        fp.append(1 - hit)
    recall = [sum(tp[: i + 1]) / positives for i in range(len(tp))]
    precision = [sum(tp[: i + 1]) / (i + 1) for i in range(len(tp))]
    eleven = sum(
        max((p for p, r in zip(precision, recall, strict=True) if r >= t), default=0) / 11
        for t in np.arange(0, 1.1, 0.1)
    )
    recalls, precisions = [0, *recall, 1], [0, *precision, 0]
    for i in range(len(precisions) - 1, 0, -1):
        precisions[i - 1] = max(precisions[i - 1], precisions[i])
    area = sum((recalls[i + 1] - recalls[i]) * precisions[i + 1] for i in range(len(recalls) - 1))
    return eleven, area


any_box = st.tuples(*[st.integers(0, 8)] * 2, *[st.integers(1, 8)] * 2).map(
    lambda b: (*b[:2], b[0] + b[2], b[1] + b[3])
)
# Mostly a few boxes of which some overlap by exactly a half or a quarter: hits, second hits and ties are frequent.
few_boxes = st.sampled_from([(0, 0, 4, 4), (0, 0, 4, 2), (0, 0, 2, 2), (1, 0, 4, 4), (5, 5, 9, 9), (5, 5, 9, 8)])
boxes = st.one_of(few_boxes, few_boxes, any_box)
objects_of_voc = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), boxes, st.booleans()), max_size=14)
rows_of_voc = st.lists(st.builds(voc_row, st.integers(0, 3), st.integers(0, 2), boxes, st.integers(0, 5)), max_size=20)
rules = st.sampled_from(["devkit", "toolkit"])


@settings(max_examples=150, deadline=None)
@given(objects=objects_of_voc, rows=rows_of_voc, rule=rules, iou=st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]))
def test_voc_equals_a_plain_loop(objects, rows, rule, iou):
    truth = voc_truth(objects)
    # The loop looks at objects in the order of the file, as the ground truth has them.
    objects = sorted(objects, key=lambda item: item[0])
    metrics = VOCGroundTruth(truth, rule, iou).score(rows)
    expected = {}
    for place, year in enumerate(("07", "12")):
        of_class = {name: plain_voc_ap(objects, rows, k, rule, iou)[place] for k, name in enumerate(NAMES)}
        present = [value for value in of_class.values() if not math.isnan(value)]
        expected[f"AP{round(100 * iou)}_voc{year}"] = sum(present) / len(present) if present else math.nan
        expected |= {f"AP{round(100 * iou)}_voc{year}/{name}": value for name, value in of_class.items()}
    assert list(metrics) == list(expected)
    assert metrics == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(objects=objects_of_voc, rows=rows_of_voc, rule=rules, box=boxes, label=st.integers(0, 2), data=st.data())
def test_voc_is_invariant_to_what_does_not_count(objects, rows, rule, box, label, data):
    rows = [{**row, "score": row["score"] + i / 100} for i, row in enumerate(rows)]  # no two alike
    truth = VOCGroundTruth(voc_truth(objects, images=5), rule)  # the fifth image has no objects
    metrics = truth.score(rows)
    assert truth.score(data.draw(st.permutations(rows))) == pytest.approx(metrics, abs=0, nan_ok=True)

    # A false detection below all others changes nothing, and above all others never raises anything.
    last, first = voc_row(4, label, box, -1), voc_row(4, label, box, 99)
    assert truth.score([*rows, last]) == pytest.approx(metrics, abs=1e-12, nan_ok=True)
    assert all(math.isnan(value) or value <= metrics[key] + 1e-12 for key, value in truth.score([first, *rows]).items())

    # A difficult object that no detection meets counts only with the toolkit.
    more = VOCGroundTruth(voc_truth([*objects, (4, label, box, True)], images=5), rule).score(rows)
    name = f"AP50_voc12/{NAMES[label]}"
    if rule == "devkit":
        assert more == pytest.approx(metrics, abs=0, nan_ok=True)
    else:
        assert math.isnan(metrics[name]) or more[name] <= metrics[name]

    # Scoring some images is scoring a ground truth of only these.
    some = VOCGroundTruth(voc_truth([item for item in objects if item[0] < 2], images=2), rule)
    chosen = [row for row in rows if row["image_id"] in ("im0", "im1")]
    assert truth.score(rows, ["im0", "im1"]) == pytest.approx(some.score(chosen), abs=0, nan_ok=True)


def test_voc_rules_differ_in_ties_and_difficult_objects():
    box, half = (0, 0, 10, 10), (0, 0, 10, 5)  # of IoU 0.5
    plain, difficult = voc_truth([(0, 0, box, False)]), voc_truth([(0, 0, box, False), (1, 0, box, True)])
    tie, sure = voc_row(0, 0, half, 0.9), voc_row(0, 0, box, 0.5)
    assert VOCGroundTruth(plain, "devkit").score([tie])["AP50_voc12"] == 0
    assert VOCGroundTruth(plain, "toolkit").score([tie])["AP50_voc12"] == 1
    on_difficult = [voc_row(1, 0, box, 0.9), sure]
    assert VOCGroundTruth(difficult, "devkit").score(on_difficult)["AP50_voc12"] == 1
    assert VOCGroundTruth(difficult, "devkit").score([sure])["AP50_voc12"] == 1
    assert VOCGroundTruth(difficult, "toolkit").score([sure])["AP50_voc12"] == 0.5
    # A second detection of an object is false, and an absent class has no figure.
    assert VOCGroundTruth(plain).score([voc_row(0, 0, box, 0.9), sure])["AP50_voc12"] == 1
    two = voc_truth([(0, 0, box, False), (1, 0, box, False)])
    rows = [voc_row(0, 0, box, 0.9), sure, voc_row(1, 0, box, 0.1)]
    assert VOCGroundTruth(two).score(rows)["AP50_voc12"] == pytest.approx((1 + 2 / 3) / 2)
    assert math.isnan(VOCGroundTruth(two).score(rows)["AP50_voc12/bee"])
    assert math.isnan(VOCGroundTruth(voc_truth([])).score([])["AP50_voc07"])
    assert VOCGroundTruth(two, iou=0.3).score([])["AP30_voc07"] == 0


reals = st.floats(0, 1000, width=32)


@settings(max_examples=40, deadline=None)
@given(
    drawn=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), reals, reals, reals, reals, st.floats(0, 1)), max_size=12
    ),
)
def test_comp4_files_are_read_back(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("comp4")
    truth = voc_truth([])
    rows = [voc_row(i, k, (x, y, x + w, y + h), score) for i, k, x, y, w, h, score in drawn]
    write_comp4(rows, NAMES, folder / "new", "val")
    back = read_comp4(folder / "new", truth)
    assert sorted(path.name for path in (folder / "new").iterdir()) == [f"comp4_det_val_{name}.txt" for name in NAMES]
    expected = sorted(rows, key=lambda row: row["category_id"])
    assert [(row["image_id"], row["category_id"], row["score"]) for row in back] == [
        (row["image_id"], row["category_id"], row["score"]) for row in expected
    ]
    np.testing.assert_allclose(
        np.reshape([row["bbox"] for row in back], (-1, 4)), np.reshape([row["bbox"] for row in expected], (-1, 4)),
        rtol=0, atol=1e-12,
    )  # fmt: skip


def test_comp4_of_pixels_is_exact(tmp_path):
    truth = voc_truth([])
    rows = [voc_row(0, 2, (0, 4, 17, 25.5), 1 / 3)]
    write_comp4(rows, NAMES, tmp_path, "test")
    text = (tmp_path / "comp4_det_test_wild_bee.txt").read_text()
    assert text == f"im0 {1 / 3!r} 1.0 5.0 17.0 25.5\n"
    assert read_comp4(tmp_path, truth) == rows
    # The plain names, any spacing and whole numbers are taken too.
    (tmp_path / "comp4_det_test_wild_bee.txt").rename(tmp_path / "wild_bee.txt")
    (tmp_path / "bee.txt").write_text("\nim1\t0.25  1 5 17 25\r\n")
    (tmp_path / "comp4_det_test_bee.txt").unlink()
    assert read_comp4(tmp_path, truth) == [voc_row(1, 1, (0, 4, 17, 25), 0.25), *rows]


def write_xml(path: Path, objects) -> None:
    """An annotation of (class, xmin, ymin, xmax, ymax)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for name, a, b, c, d in objects
    )
    size = "<size><width>500</width><height>500</height><depth>3</depth></size>"
    path.write_text(f"<annotation>{size}{text}</annotation>")


def test_voc_is_as_published(command, reference, tmp_path):
    case = reference / "voc_ap_case1"
    home, results = tmp_path / "VOC", tmp_path / "dets"
    results.mkdir()
    lines = []
    for path in sorted((case / "gts").glob("*.txt")):
        boxes = [line.split() for line in path.read_text().splitlines() if line.strip()]
        corners = [(name, *map(int, (x, y)), int(x) + int(w), int(y) + int(h)) for name, x, y, w, h in boxes]
        write_xml(home / "Annotations" / f"{path.stem}.xml", corners)
        for line in (case / "dets" / path.name).read_text().splitlines():
            _, score, x, y, w, h = line.split()
            lines.append(f"{path.stem} {score} {x} {y} {int(x) + int(w)} {int(y) + int(h)}\n")
    (results / "object.txt").write_text("".join(lines))
    expected = json.loads((case / "expected.json").read_text())
    shared = ("--truth", home, "--results", results, "--classes", "object", "--voc-rule", "toolkit")
    for kind, metrics in (("voc07", expected["eleven_point"]), ("voc12", expected["every_point"])):
        assert len(metrics) == 4
        for iou, figure in metrics.items():
            name = f"AP{float(iou) * 100:.0f}_{kind}"
            got = scored(command, *shared, "--type", kind, "--iou", iou)
            assert got == pytest.approx({name: figure, f"{name}/object": figure}, abs=1e-10)  # their digits are cut


@pytest.fixture
def voc_folders(tmp_path) -> tuple[Path, Path]:
    """A ground truth of two images in VOC's layout without image files, and results that find everything."""
    home, results = tmp_path / "VOC", tmp_path / "dets"
    write_xml(home / "Annotations" / "a.xml", [("cat", 1, 1, 20, 30), ("dog", 5, 5, 40, 40)])
    write_xml(home / "Annotations" / "b.xml", [("dog", 2, 2, 9, 9)])
    (home / "ImageSets" / "Main").mkdir(parents=True)
    (home / "ImageSets" / "Main" / "val.txt").write_text("a\n")
    results.mkdir()
    (results / "comp4_det_val_cat.txt").write_text("a 0.9 1 1 20 30\n")
    (results / "comp4_det_val_dog.txt").write_text("a 0.9 5 5 40 40\n")
    return home, results


def test_voc_through_the_command(command, voc_folders):
    home, results = voc_folders
    options = ("--type", "voc12", "--truth", home, "--results", results)
    whole = scored(command, *options)
    assert len(whole) == 21
    assert (whole["AP50_voc12/cat"], whole["AP50_voc12/dog"], whole["AP50_voc12"]) == (1, 0.5, 0.75)
    assert math.isnan(whole["AP50_voc12/sofa"])
    assert scored(command, *options, "--split", "val")["AP50_voc12"] == 1
    table = command("evaluate", *options)
    assert table.code == 0
    for words in ("2 images, 3 objects, 2 detections", "0.7500", "devkit", "IoU > 0.5", "– nothing to find"):
        assert words in table.out, words


BAD_VOC = {
    "no folder": (lambda h, r: r.rename(r.with_name("x")), [], ["dets is not a folder"]),
    "no files": (lambda h, r: [path.unlink() for path in r.iterdir()], [], ["dets has no detection files"]),
    "unknown class": (lambda h, r: (r / "catt.txt").write_text(""), [], ["catt.txt: not named", "did you mean 'cat'"]),
    "two of a class": (
        lambda h, r: (r / "comp4_det_train_cat.txt").write_text(""),
        [],
        ["comp4_det_val_cat.txt: comp4_det_train_cat.txt holds class 'cat' already"],
    ),
    "five words": (lambda h, r: (r / "cow.txt").write_text("\na .9 1 1 5\n"), [], ["cow.txt, line 2: not 'name score"]),
    "a word": (lambda h, r: (r / "cow.txt").write_text("a .9 1 1 5 x\n"), [], ["cow.txt, line 1: not 'name score"]),
    "NaN": (lambda h, r: (r / "cow.txt").write_text("a nan 1 1 5 5\n"), [], ["cow.txt, line 1: not finite"]),
    "corners": (
        lambda h, r: (r / "cow.txt").write_text("a .9 9 9 5 12\n"),
        [],
        ["cow.txt, line 1: xmax or ymax is before"],
    ),
    "unknown image": (lambda h, r: (r / "cow.txt").write_text("c .9 1 1 5 5"), [], ["line 1: image 'c' is not one of"]),
    "binary": (lambda h, r: (r / "cow.txt").write_bytes(b"\xff\xfe\x00"), [], ["cow.txt: not a text file"]),
    "no Annotations": (lambda h, r: (h / "Annotations").rename(h / "x"), [], ["VOC has no folder Annotations"]),
    "no XML": (
        lambda h, r: [path.unlink() for path in (h / "Annotations").iterdir()],
        [],
        ["Annotations has no XML"],
    ),
    "broken XML": (lambda h, r: (h / "Annotations" / "b.xml").write_text("<a>"), [], ["b.xml: not valid XML"]),
    "NaN ground truth": (
        lambda h, r: write_xml(h / "Annotations" / "b.xml", [("dog", 1, "nan", 3, 4)]),
        [],
        ["b.xml, object 1, dog: the box is not four finite numbers"],
    ),
    "other classes": (lambda h, r: None, ["--classes", "cat"], ["a.xml, object 2: unknown class 'dog'", "classes"]),
    "no split": (lambda h, r: None, ["--split", "vall"], ["vall.txt does not exist; there are: val"]),
    "empty split": (
        lambda h, r: (h / "ImageSets" / "Main" / "none.txt").write_text(""),
        ["--split", "none"],
        ["split 'none' names no image"],
    ),
    "split of no file": (
        lambda h, r: (h / "ImageSets" / "Main" / "val.txt").write_text("a\nz\n"),
        ["--split", "val"],
        ["z.xml: no such file"],
    ),
}


@pytest.mark.parametrize("case", BAD_VOC)
def test_bad_voc_files_are_named(command, voc_folders, case):
    change, options, words = BAD_VOC[case]
    home, results = voc_folders
    change(home, results)
    result = command("evaluate", "--type", "voc07", "--truth", home, "--results", results, *options)
    assert result.code == 1, result.err
    assert len(result.err.splitlines()) <= 5
    for word in words:
        assert word in result.err, (word, result.err)
