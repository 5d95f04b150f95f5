"""Skeletons other than COCO's: names, pairs, deviations, and what the data, the metrics and whole runs make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import sis_lightning
from sis_lightning.datamodules import COCOKeypointsDataModule
from sis_lightning.datasets.coco import COCOKeypointsDataset
from sis_lightning.datasets.coco_reader import read_coco
from sis_lightning.datasets.constants import COCO_FLIP_PAIRS, COCO_KEYPOINTS, COCO_SIGMAS
from sis_lightning.datasets.skeleton import Skeleton
from sis_lightning.errors import DataError, UsageError

#: Five of COCO's keypoints in another order and under other names, as a horse.
PLACES = {"muzzle": 0, "hoof_R": 16, "hoof_L": 15, "hip left": 11, "hip right": 12}
PAIRS = ((2, 1), (3, 4))
SIGMAS = [0.03, 0.09, 0.08, 0.1, 0.11]


def horses(synthetic: Path, root: Path, *, others: bool = True, **category: object) -> Path:
    """The synthetic people as horses with five keypoints, beside a category that has none."""
    shutil.copytree(synthetic / "coco", root / "coco")
    for split in ("train2017", "val2017"):
        path = root / "coco" / "annotations" / f"person_keypoints_{split}.json"
        content = json.loads(path.read_text())
        edges = [[1, 4], [1, 5], [4, 3], [5, 2]]
        content["categories"] = [{"id": 4, "name": "horse", "keypoints": list(PLACES), "skeleton": edges, **category}]
        for row in content["annotations"]:
            points = np.reshape(row["keypoints"], (17, 3))[list(PLACES.values())]
            row |= {"category_id": 4, "keypoints": points.ravel().tolist()}
            row["num_keypoints"] = int((points[:, 2] > 0).sum())
        if others:
            content["categories"].insert(0, {"id": 2, "name": "cart"})
            first = content["annotations"][0]
            cart = {key: first[key] for key in ("image_id", "bbox", "area", "iscrowd")}
            content["annotations"].insert(0, {**cart, "id": 10**6, "category_id": 2})
        path.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("left_eye", "right_eye"),
        ("EyeLeft", "EyeRight"),
        ("LEFT EAR", "RIGHT EAR"),
        ("l_eye", "r_eye"),
        ("eye-L", "eye-R"),
        ("LEye", "REye"),
        ("eyeL", "eyeR"),
        ("front left paw left", "front right paw right"),
    ],
)
def test_pairs_are_known_by_their_names(left, right):
    assert Skeleton.from_category(["bright", right, "tail", "lip", left, "rip"]).flip_pairs == ((4, 1),)


def test_without_names_there_are_no_pairs_but_coco_s_seventeen():
    plain = Skeleton.from_category([], count=3)
    assert (plain.names, plain.flip_pairs, plain.measured) == (("keypoint 1", "keypoint 2", "keypoint 3"), (), False)
    assert plain.sigmas == (pytest.approx(np.mean(COCO_SIGMAS)),) * 3
    assert Skeleton.from_category([], count=17) == Skeleton.from_category(COCO_KEYPOINTS)
    assert Skeleton.from_category(COCO_KEYPOINTS).flip_pairs == COCO_FLIP_PAIRS
    turned = Skeleton.from_category(COCO_KEYPOINTS[::-1])
    assert turned.sigmas == COCO_SIGMAS[::-1]
    assert turned.measured
    assert {frozenset(pair) for pair in turned.flip_pairs} == {frozenset((16 - a, 16 - b)) for a, b in COCO_FLIP_PAIRS}


@pytest.mark.parametrize(
    ("category", "words"),
    [
        ({"keypoints": ["a", "a", "b", "c", "d"]}, "two of its keypoints are named 'a'"),
        ({"keypoints": "nose"}, "keypoints is 'nose', not a list of names"),
        ({"skeleton": [[0, 1]]}, r"skeleton has \[0, 1\], must be pairs of 1…5"),
        ({"skeleton": [[1, 2, 3]]}, r"skeleton has \[1, 2, 3\]"),
        ({"skeleton": [["a", "b"]]}, "not a list of pairs of numbers"),
        ({"sigmas": [0.1, 0.2]}, "must be 5 numbers above 0"),
        ({"sigmas": [0.1, 0.2, 0.1, 0.2, 0]}, "must be 5 numbers above 0"),
        ({"sigmas": "small"}, "not a list of numbers"),
    ],
)
@pytest.mark.parametrize("others", [True, False])
def test_contradictions_are_refused(synthetic, tmp_path, category, words, others):
    root = horses(synthetic, tmp_path, others=others, **category)
    with pytest.raises(DataError, match=f"category 'horse': .*{words}"):
        COCOKeypointsDataset(root, "val2017")


def test_the_category_is_chosen(synthetic, tmp_path):
    root = horses(synthetic, tmp_path)
    known = COCOKeypointsDataset(root, "val2017", evaluation=True)
    assert known.meta.class_names == ("horse",)
    assert known.meta.category_ids == (4,)
    assert known.annotations.skeleton == COCOKeypointsDataset(root, "val2017", category="horse").annotations.skeleton
    with pytest.raises(DataError, match="no category 'hose' among its 2"):
        COCOKeypointsDataset(root, "val2017", category="hose")
    path = root / "coco" / "annotations" / "person_keypoints_val2017.json"
    content = json.loads(path.read_text())
    content["categories"].append({**content["categories"][1], "id": 5, "name": "mule"})
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"2 categories may have keypoints \('horse', 'mule'\)"):
        COCOKeypointsDataset(root, "val2017")
    assert len(COCOKeypointsDataset(root, "val2017", evaluation=True, category="mule").annotations.image) == 0


def test_pairs_and_deviations_are_options(synthetic, tmp_path):
    root = horses(synthetic, tmp_path)
    data = COCOKeypointsDataModule(str(root))
    data.setup("fit")
    assert data.meta.flip_pairs == PAIRS
    assert data.meta.skeleton == ((0, 3), (0, 4), (3, 2), (4, 1))
    assert data.notes["flip"] == "exchanges hoof_L and hoof_R, hip left and hip right"
    assert "the mean of COCO's" in data.notes["sigmas"]
    data = COCOKeypointsDataModule(str(root), flip_pairs=[("muzzle", "hoof_L")], sigmas=SIGMAS)
    data.setup("fit")
    assert (data.meta.flip_pairs, data.meta.sigmas) == (((0, 2),), tuple(SIGMAS))
    assert "sigmas" not in data.notes
    for wrong, words in (
        ({"flip_pairs": [("muzle", "hoof_L")]}, "did you mean 'muzzle'"),
        ({"flip_pairs": [("muzzle", "hoof_L"), ("muzzle", "hoof_R")]}, "must be pairs of different names"),
        ({"sigmas": [0.1]}, "must be 5 numbers above 0"),
    ):
        with pytest.raises(UsageError, match=words):
            COCOKeypointsDataModule(str(root), **wrong).setup("fit")


def test_keypoints_are_those_of_the_file(synthetic, tmp_path):
    root = horses(synthetic, tmp_path)
    people = read_coco(synthetic / "coco/annotations/person_keypoints_train2017.json", kind="keypoints")
    known = read_coco(root / "coco/annotations/person_keypoints_train2017.json", kind="keypoints")
    np.testing.assert_array_equal(known.keypoints, people.keypoints[:, list(PLACES.values())])
    np.testing.assert_array_equal(known.boxes, people.boxes)


def test_a_whole_run_with_another_skeleton(command, small, synthetic, tmp_path):
    root = horses(synthetic, tmp_path / "own")
    options = [*small("kpt_coco", steps=2), "--data.root", root, "--data.synthetic", "null", "--run_dir", "run"]
    refused = command("fit", *options)
    assert refused.code == 2
    assert "the data has 5 keypoints, but the network 17: set num_keypoints to 5" in refused.err
    options += ["--model.num_keypoints", 5, "--data.sigmas", json.dumps(SIGMAS), "--model.shown_score", 0]
    fit = command("fit", *options)
    assert fit.code == 0, fit.err
    assert "exchanges hoof_L and hoof_R, hip left and hip right" in fit.out
    test = command("test", *options)
    assert test.code == 0, test.err

    # Rows near the ground truth, scored by ours and by pycocotools with these deviations.
    truth = root / "coco" / "annotations" / "person_keypoints_val2017.json"
    content, rng = json.loads(truth.read_text()), np.random.default_rng(3)
    rows = [
        {"image_id": row["image_id"], "category_id": 4, "score": float(rng.random())}
        | {"keypoints": (np.array(row["keypoints"], dtype=float) + rng.normal(0, 2.5, 15)).tolist()}
        for row in content["annotations"]
        if row["category_id"] == 4
    ]
    Path("results.json").write_text(json.dumps(rows))
    line = ["evaluate", "--type", "keypoints", "--truth", truth, "--results", "results.json", "--json"]
    scores = {}
    for name, extra in {
        "ours": ["--sigmas", *SIGMAS],
        "mean": [],
        "py": ["--sigmas", *SIGMAS, "--evaluator", "pycocotools"],
    }.items():
        scored = command(*line, *extra)
        assert scored.code == 0, scored.err
        scores[name] = json.loads(scored.out)["metrics"]
    theirs = COCO()
    theirs.dataset = {**content, "annotations": [row for row in content["annotations"] if row["category_id"] == 4]}
    theirs.createIndex()
    oracle = COCOeval(theirs, theirs.loadRes(rows), "keypoints")
    oracle.params.kpt_oks_sigmas = np.array(SIGMAS)
    oracle.evaluate()
    oracle.accumulate()
    oracle.summarize()
    assert 0.1 < oracle.stats[0] < 0.9
    assert scores["ours"]["AP"] == pytest.approx(oracle.stats[0], abs=1e-12)
    assert scores["py"] == pytest.approx(scores["ours"], abs=1e-12, nan_ok=True)
    assert scores["mean"]["AP"] != scores["ours"]["AP"]
    short = command(*line[:-1], "--sigmas", 0.1)
    assert short.code == 2
    assert "must be 5 numbers above 0" in short.err

    # The run's own results are scored alike, and its prediction has the names.
    (results,) = Path("run/test_results").glob("*.json")
    again = command(*line[:6], results, "--json", "--sigmas", *SIGMAS)
    assert again.code == 0, again.err
    record = json.loads(Path("run/test.json").read_text())
    assert json.loads(again.out)["metrics"]["AP"] == pytest.approx(record["metrics"]["test/AP"], abs=1e-6)
    task = sis_lightning.load("run")
    assert task.meta.keypoint_names == tuple(PLACES)
    assert task.meta.flip_order == (0, 2, 1, 4, 3)
    prediction = task.predict(Image.new("RGB", (64, 48), "red"))
    assert prediction.describe() == "1 horse"
    assert set(prediction.to_dict()["people"][0]["keypoints"]) == set(PLACES)
    assert prediction.coco_categories()[0]["skeleton"] == [[1, 4], [1, 5], [4, 3], [5, 2]]
    assert prediction.draw().shape[0] == 3
