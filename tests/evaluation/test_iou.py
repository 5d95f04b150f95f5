"""Metrics against numpy and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from sis_lightning.errors import UsageError
from sis_lightning.evaluation.iou import IoUEvaluator


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(2, 6), seed=st.integers(0, 999), images=st.integers(1, 5), void=st.floats(0, 0.9))
def test_iou_is_intersection_over_union_of_the_whole_set(classes, seed, images, void):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (images, 7, 5))
    predicted = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, max(classes - 1, 1), truth.shape))
    truth = np.where(rng.random(truth.shape) < void, 255, truth)
    metric = IoUEvaluator([f"c{i}" for i in range(classes)])
    for one, other in zip(predicted, truth, strict=True):
        metric.update(torch.tensor(one), torch.tensor(other))
    got = metric.compute()

    known = truth != 255
    ious = []
    for i in range(classes):
        hit = ((predicted == i) & (truth == i)).sum()
        union = (((predicted == i) & known) | (truth == i)).sum()
        ious.append(hit / union if union else np.nan)
        np.testing.assert_allclose(got[f"iou/c{i}"], ious[-1], rtol=1e-12)
    if known.any():
        np.testing.assert_allclose(got["miou"], np.nanmean(ious), rtol=1e-12)
        np.testing.assert_allclose(got["pixel_accuracy"], (predicted == truth)[known].mean(), rtol=1e-12)

    whole = IoUEvaluator([f"c{i}" for i in range(classes)])
    whole.update(torch.tensor(predicted), torch.tensor(truth))
    assert all(torch.equal(whole.compute()[key].nan_to_num(-1), value.nan_to_num(-1)) for key, value in got.items())


def test_agrees_with_torchmetrics_where_every_class_occurs():
    torch.manual_seed(0)
    predicted, truth = torch.randint(0, 4, (2, 50, 50)), torch.randint(0, 4, (2, 50, 50))
    truth[:, :5] = 255
    ours = IoUEvaluator(list("abcd"))
    ours.update(predicted, truth)
    theirs = MulticlassJaccardIndex(4, ignore_index=255)
    theirs.update(predicted, truth)
    torch.testing.assert_close(ours.compute()["miou"].float(), theirs.compute(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("predictions", "targets", "words"),
    [
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5), ["float32 (2, 3, 4, 5)", "class ids", "(2, 4, 5)", "argmax"]),
        (torch.zeros(4, 5, dtype=torch.uint8), torch.zeros(4, 6), ["(4, 5)", "(4, 6)"]),
        (torch.zeros(4, 5), torch.zeros(4, 5), ["float32", "class ids"]),
        (torch.full((4, 5), 3), torch.zeros(4, 5), ["predictions have the class id 3", "0…2", "3 classes"]),
        (torch.full((4, 5), -1), torch.zeros(4, 5), ["predictions have the class id -1"]),
        (torch.zeros(4, 5).int(), torch.full((4, 5), 254), ["targets have the class id 254", "255"]),
        ([torch.zeros(4, 5).int()], [], ["1 predictions for 0 images"]),
    ],
)
def test_invalid_predictions_and_targets_are_named(predictions, targets, words):
    metric = IoUEvaluator(["background", "ant", "bee"])
    with pytest.raises(UsageError) as caught:
        metric.update(predictions, targets)
    assert all(word in str(caught.value) for word in words), caught.value


def test_predictions_at_pixels_that_are_not_annotated_do_not_count():
    metric = IoUEvaluator(["background", "ant"])
    metric.update(torch.tensor([[255, 1]]), torch.tensor([[255, 1]], dtype=torch.uint8))
    assert metric.compute()["pixel_accuracy"] == 1
