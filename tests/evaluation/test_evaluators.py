"""Evaluators give the metrics of the files that they replace, on one device and on several."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchmetrics.classification import MulticlassAccuracy

from sis_lightning.datasets.coco import COCODetectionDataset, COCOKeypointsDataset
from sis_lightning.datasets.coco_reader import read_coco
from sis_lightning.datasets.voc import VOCDetectionDataset
from sis_lightning.errors import UsageError
from sis_lightning.evaluation import COCOEvaluator, TopKEvaluator, VOCEvaluator, evaluate
from sis_lightning.evaluation.coco import COCOGroundTruth


def boxes_near(truth, rng: np.random.Generator, classes: int) -> dict[str, torch.Tensor]:
    """Detections around the true boxes, with equal scores among them, and false ones."""
    boxes = np.concatenate([truth["boxes"] + rng.normal(0, 2, truth["boxes"].shape), rng.uniform(0, 30, (3, 4))])
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    labels = np.concatenate([truth["labels"], rng.integers(1, classes + 1, 3)])
    scores = rng.integers(0, 6, len(labels)) / 5
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.tensor(labels),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }


def keypoints_near(truth, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    keypoints = truth["keypoints"].copy()
    keypoints[..., :2] += rng.normal(0, 1, keypoints[..., :2].shape)
    keypoints[..., 2] = rng.random(keypoints.shape[:2])
    return {"keypoints": torch.tensor(keypoints), "scores": torch.tensor(rng.random(len(keypoints)))}


def truths_of(dataset) -> list[dict]:
    return [dataset.all_objects.ground_truth(index) for index in range(len(dataset))]


@pytest.mark.parametrize("backend", ["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize("kind", ["bbox", "keypoints"])
def test_coco_metrics_are_those_of_the_annotation_file(synthetic, tmp_path, kind, backend):
    rng = np.random.default_rng(0)
    if kind == "bbox":
        dataset = COCODetectionDataset(synthetic, "val2017", evaluation=True)
    else:
        dataset = COCOKeypointsDataset(synthetic, "val2017", evaluation=True)
    truths = truths_of(dataset)
    predictions = [boxes_near(t, rng, 80) if kind == "bbox" else keypoints_near(t, rng) for t in truths]
    evaluator = COCOEvaluator(kind, dataset.meta.category_ids, backend, class_names=dataset.meta.class_names)
    for part in (slice(0, 2), slice(2, None)):
        evaluator.update(predictions[part], truths[part])
    metrics = evaluator.compute()
    evaluator.reset()
    assert metrics["AP"] > 0.1
    path = evaluator.write_results(tmp_path)
    assert path.name.endswith("_val2017_sis-lightning_results.json")
    again = evaluate(dataset.annotations.source, path, kind, backend=backend)
    assert again.metrics == pytest.approx(metrics, abs=0, nan_ok=True)
    # Some images are scored as the file restricted to them.
    evaluator.update(predictions[:3], truths[:3])
    chosen = {truth["image_id"] for truth in truths[:3]}
    rows = [row for row in json.loads(path.read_text()) if row["image_id"] in chosen]
    known = COCOGroundTruth(read_coco(dataset.annotations.source, kind=kind), kind, backend)
    assert evaluator.compute() == pytest.approx(known.score(rows, chosen), abs=0, nan_ok=True)


def test_voc_metrics_are_those_of_the_annotation_files(synthetic, tmp_path):
    rng = np.random.default_rng(0)
    dataset = VOCDetectionDataset(synthetic, ["2007/test"], evaluation=True)
    truths = truths_of(dataset)
    predictions = [boxes_near(truth, rng, 20) for truth in truths]
    evaluator = VOCEvaluator(dataset.meta.class_names)
    evaluator.update(predictions, truths)
    metrics = evaluator.compute()
    assert metrics["AP50_voc07"] > 0.1
    evaluator.write_results(tmp_path)
    for kind in ("voc07", "voc12"):
        home, results = synthetic / "VOCdevkit" / "VOC2007", tmp_path / "VOC2007" / "Main"
        again = evaluate(home, results, kind, split="test")
        assert again.metrics == pytest.approx({key: metrics[key] for key in again.metrics}, abs=0, nan_ok=True)


def test_an_image_that_several_splits_list_is_written_for_each(synthetic, tmp_path):
    dataset = VOCDetectionDataset(synthetic, ["2012/trainval", "2012/train"], evaluation=True)
    truths = truths_of(dataset)
    assert {truth["source"] for truth in truths} == {("2012/trainval",), ("2012/trainval", "2012/train")}
    evaluator = VOCEvaluator(dataset.meta.class_names)
    evaluator.update(
        [{"boxes": t["boxes"], "labels": t["labels"], "scores": np.ones(len(t["labels"]))} for t in truths], truths
    )
    evaluator.compute()
    evaluator.write_results(tmp_path)
    lines = {
        split: sum(len(path.read_text().splitlines()) for path in tmp_path.glob(f"VOC2012/Main/comp4_det_{split}_*"))
        for split in ("trainval", "train")
    }
    assert lines["trainval"] == sum(len(truth["labels"]) for truth in truths)
    assert 0 < lines["train"] < lines["trainval"]


def test_boxes_and_labels_are_enough_of_a_ground_truth():
    box = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1])}
    for evaluator in (COCOEvaluator("bbox", [7]), VOCEvaluator(["thing"])):
        evaluator.update([{**box, "scores": torch.tensor([0.5])}] * 2, [box, box])
        metrics = evaluator.compute()
        assert metrics[next(iter(metrics))] == pytest.approx(1)
        with pytest.raises(UsageError, match="1 predictions for 2 images"):
            evaluator.update([box], [box, box])
        with pytest.raises(UsageError, match="no 'boxes'"):
            evaluator.update([box], [{}])
    with pytest.raises(UsageError, match="must be 'bbox' or 'keypoints'"):
        COCOEvaluator("segm", [1])


def test_images_without_annotations_have_results_but_no_metrics(tmp_path):
    evaluator = COCOEvaluator("bbox", [7])
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, dtype=np.int64)}
    found = {"boxes": torch.ones(1, 4), "labels": torch.tensor([1]), "scores": torch.ones(1)}
    evaluator.update([found], [{**nothing, "image_id": 3, "annotated": False, "source": "test-dev2017"}])
    assert evaluator.compute() == {}
    assert not evaluator.annotated
    (row,) = json.loads(evaluator.write_results(tmp_path).read_text())
    assert row == {"image_id": 3, "category_id": 7, "bbox": [1, 1, 0, 0], "score": 1}


def test_low_precision_and_empty_predictions_are_scored():
    truth = {"boxes": np.array([[0.0, 0, 10, 10]]), "labels": np.array([1])}
    evaluator = COCOEvaluator("bbox", [1])
    found = {"boxes": torch.tensor([[0, 0, 10, 10]], dtype=torch.bfloat16), "labels": torch.tensor([1])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    evaluator.update([{**found, "scores": torch.ones(1, dtype=torch.bfloat16)}, none], [truth, truth])
    assert evaluator.compute()["AR100"] == pytest.approx(0.5)
    persons = COCOEvaluator("keypoints", [1])
    nobody = {"keypoints": torch.zeros(0, 17, 3), "scores": torch.zeros(0)}
    persons.update([nobody], [{"boxes": np.zeros((0, 4)), "keypoints": np.zeros((0, 17, 3))}])
    assert math.isnan(persons.compute()["AP"])


def test_ids_beyond_64_bits_are_scored():
    truth = {"boxes": np.array([[0.0, 0, 10, 10]]), "labels": np.array([1]), "image_id": 2**80}
    evaluator = COCOEvaluator("bbox", [1])
    evaluator.update([{**truth, "scores": np.ones(1)}], [truth])
    assert evaluator.compute()["AP"] == pytest.approx(1)


def test_sigmas_other_than_cocos():
    keypoints = np.concatenate([np.full((1, 3, 2), 20.0), np.full((1, 3, 1), 2.0)], axis=2)
    truth = {"boxes": np.array([[0.0, 0, 60, 60]]), "keypoints": keypoints}
    near = {"keypoints": keypoints + np.array([4, 0, 0]), "scores": np.ones(1)}
    ap = []
    for sigma in (0.02, 0.2):
        evaluator = COCOEvaluator("keypoints", [1], sigmas=[sigma] * 3)
        evaluator.update([near], [truth])
        ap.append(evaluator.compute()["AP"])
    assert ap[0] < ap[1] == pytest.approx(1)


@pytest.mark.parametrize("classes", [2, 5, 7])
def test_top_k_is_the_accuracy_of_torchmetrics(classes):
    torch.manual_seed(0)
    ours = TopKEvaluator(classes)
    ks = [k for k in (1, 5) if k < classes]
    theirs = {k: MulticlassAccuracy(classes, top_k=k, average="micro") for k in ks}
    for _ in range(3):
        logits, labels = torch.randn(16, classes), torch.randint(classes, (16,))
        ours.update(logits, labels)
        for metric in theirs.values():
            metric.update(logits, labels)
    metrics = ours.compute()
    assert list(metrics) == [name for k in ks for name in (f"top{k}", f"top{k}_error_percent")]
    for k in ks:
        assert metrics[f"top{k}"] == theirs[k].compute()
        assert metrics[f"top{k}_error_percent"] == 100 * (1 - theirs[k].compute())
    ours.reset()
    assert ours.total == 0
    with pytest.raises(UsageError, match="num_classes is 1"):
        TopKEvaluator(1)


def evaluate_on(rank: int, world: int, port: int, root: Path, answers) -> None:
    """Scores every image on one of two devices, one of them on both."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    dataset = COCODetectionDataset(root, "val2017", evaluation=True)
    truths = truths_of(dataset)
    rng = np.random.default_rng(0)
    predictions = [boxes_near(truth, rng, 80) for truth in truths]
    evaluator = COCOEvaluator("bbox", dataset.meta.category_ids)
    mine = [*range(rank, len(truths), world), 0]
    evaluator.update([predictions[i] for i in mine], [truths[i] for i in mine])
    metrics = evaluator.compute()
    gathered = len(evaluator._scored)
    broken = COCOEvaluator("bbox", dataset.meta.category_ids, "no such library")
    broken.update([predictions[0]], [truths[0]])
    try:
        broken.compute()
    except UsageError as error:
        answers.put((rank, metrics, gathered, str(error)))
    dist.destroy_process_group()


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_devices_score_as_one_and_both_hear_of_an_error(synthetic):
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), free_port()
    devices = [context.Process(target=evaluate_on, args=(rank, 2, port, synthetic, answers)) for rank in range(2)]
    for device in devices:
        device.start()
    got = sorted((answers.get() for _ in devices), key=lambda answer: answer[0])
    for device in devices:
        device.join()
        assert device.exitcode == 0
    dataset = COCODetectionDataset(synthetic, "val2017", evaluation=True)
    truths, rng = truths_of(dataset), np.random.default_rng(0)
    evaluator = COCOEvaluator("bbox", dataset.meta.category_ids)
    evaluator.update([boxes_near(truth, rng, 80) for truth in truths], truths)
    assert [gathered for _, _, gathered, _ in got] == [len(truths), 0]  # only the first device needs the memory
    for _, metrics, _, error in got:
        assert metrics == pytest.approx(evaluator.compute(), abs=1e-12, nan_ok=True)
        assert "no such library" in error
