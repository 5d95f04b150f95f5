"""Benchmarks: what their ratios mean, and that every command measures and keeps what it says."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sis_lightning import Classifier
from sis_lightning.bench.costs import _write_coco
from sis_lightning.bench.models import Contender, Settings, peak_memory, work
from sis_lightning.bench.paired import Ratio, time_alternately
from sis_lightning.bench.roofline import compiled_traffic, eager_traffic, flops
from sis_lightning.datasets.coco import COCODetectionDataset, COCOKeypointsDataset
from sis_lightning.errors import UsageError
from sis_lightning.models.complexity import count_macs


@pytest.mark.parametrize("rounds", [6, 11, 20])
def test_the_interval_contains_the_median_in_95_of_100_cases(rounds):
    rng = np.random.default_rng(rounds)
    ratios = [Ratio.of(rng.lognormal(0.3, 0.4, rounds)) for _ in range(2000)]
    share = np.mean([ratio.low <= np.exp(0.3) <= ratio.high for ratio in ratios])
    assert share > 0.94
    # It is not wider than needed: one value further in, it would contain the median too rarely.
    assert np.mean([ratio.high - ratio.low for ratio in ratios]) < {6: 1.7, 11: 1.3, 20: 0.8}[rounds]


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=30))
def test_an_interval_that_contains_1_shows_no_difference(ratios):
    ratio = Ratio.of(ratios)
    assert min(ratios) <= ratio.low <= ratio.median <= ratio.high <= max(ratios)
    assert ratio.verdict == ("faster" if ratio.low > 1 else "slower" if ratio.high < 1 else "no difference shown")


def test_alternate_timing_finds_the_faster_function(monkeypatch):
    # The work itself advances the clock, a little more each time, as on a machine that becomes slower.
    now, calls = [0.0], []
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(f"sis_lightning.bench.paired.time.{name}", lambda: now[0])

    def work(name: str, seconds: float):
        def spend() -> None:
            calls.append(name)
            now[0] += seconds * (1 + 0.01 * len(calls))

        return spend

    quick, slow = time_alternately([work("quick", 1.0), work("slow", 3.0)], rounds=8, seconds=1.0, warmup=1)
    ratio = quick.faster_than(slow)
    assert (ratio.verdict, slow.faster_than(quick).verdict) == ("faster", "slower")
    assert ratio.median == pytest.approx(3, rel=0.03)  # although the last round was slower than the first
    assert len(quick.wall) == len(slow.cpu) == 8
    # Neither function always follows the other.
    assert {"quick slow", "slow quick"} <= {f"{one} {two}" for one, two in itertools.pairwise(calls[4:])}


def test_contenders():
    ours = Contender.parse("sis50:interactive2+deploy+compile")
    assert (ours.source, ours.name, ours.operator, ours.treatments) == (
        *("ours", "sis50", "interactive2"),
        ("deploy", "compile"),
    )
    peer = Contender.parse("timm:res2net50_26w_4s")
    assert (peer.source, peer.name, peer.operator) == ("timm", "res2net50_26w_4s", None)
    with pytest.raises(UsageError, match="did you mean 'deploy'"):
        Contender.parse("sis50+deplyo")
    with pytest.raises(UsageError, match="cannot be trained"):
        Contender.parse("sis_demo+deploy").build("train")
    for wrong in ("timm:res2nt50", "torchvision:resnet5000", "sis_dem"):
        with pytest.raises(UsageError, match=wrong.partition(":")[2] or wrong):
            Contender.parse(wrong).build("train")


def test_memory_grows_with_the_batch():
    small, large = (
        peak_memory(Contender.parse("sis_demo"), Settings(mode="train", batch=batch, size=128)) for batch in (4, 32)
    )
    # Activations of 28 images more, at 128 px, are tens of megabytes.
    assert large - small > 20e6


def test_traffic_and_operations_are_those_of_the_mathematics():
    x = torch.randn(2, 8, 16, 16)
    conv = nn.Conv2d(8, 4, 3, padding=1)

    def chain(x):
        return (x * 2).sigmoid() + 1

    with torch.inference_mode():
        in_and_out = x.nbytes + 4 * 2 * 4 * 16 * 16
        assert eager_traffic(lambda: conv(x)) == in_and_out + 4 * (4 * 8 * 9 + 4)
        assert flops(lambda: conv(x)) == 2 * 2 * 4 * 8 * 9 * 16 * 16
        assert eager_traffic(lambda: chain(x).view(2, -1)[:, 3:]) == 6 * x.nbytes
        fused = torch.compile(chain)
        assert compiled_traffic(lambda: fused(x)) == 2 * x.nbytes
        assert compiled_traffic(lambda: fused(x)) is None  # nothing was compiled


def test_training_computes_three_times_what_inference_does():
    # Forward, and the gradients of inputs and of weights; the image needs none.
    few = Settings(mode="inference", batch=2, size=32)
    once = flops(work(Contender.parse("sis_demo"), few))
    net = Classifier("sis_demo", 1000)
    assert once == 2 * 2 * count_macs(net, torch.randn(1, 3, 32, 32))
    stem = 2 * 2 * count_macs(net.backbone.stem, torch.randn(1, 3, 32, 32))
    assert flops(work(Contender.parse("sis_demo"), replace(few, mode="train"))) == 3 * once - stem


def test_networks_are_compared_and_kept(command):
    line = ["bench", "sis_demo", "torchvision:resnet18", "--batch", 2, "--size", 32, "--rounds", 6, "--seconds", 0.01]
    result = command(*line, "--mode", "inference", "--name", "mine", "--out", "kept")
    assert result.code == 0, result.err
    kept = json.loads(Path("kept/mine.json").read_text())
    assert [row["network"] for row in kept["rows"]] == ["sis_demo", "torchvision:resnet18"]
    assert all(row["images/s"] > 0 and row["peak MB"] > 0 and row["MB an image"] > 0 for row in kept["rows"])
    shares = [row[rate] for row in kept["rows"] for rate in ("GFLOP/s", "GB/s")]
    assert all(float(share.split()[0]) > 0 for share in shares)
    assert {"torch", "torchvision"} == set(kept["versions"])
    assert any(word in kept["note"] for word in ("is faster than", "is slower than", "not shown to be"))
    assert "torchvision:resnet18" in Path("kept/README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "what should be timed?"),
        (["sis50", "--eval"], "what should be timed?"),
        (["sis50", "--batch", "0"], "--batch is 0"),
        (["sis50+fast"], "no treatment 'fast'"),
    ],
)
def test_what_cannot_be_timed_is_refused(command, arguments, words):
    result = command("bench", *arguments, "--out", "kept")
    assert result.code == 2
    assert words in result.err
    assert not Path("kept").exists()


def test_results_are_kept_beside_those_of_other_benchmarks(command, tmp_path):
    # The tables of other benchmarks in the folder stay in its README.
    first = command("bench", "--eval", "--images", "2", "--out", "kept")
    assert first.code == 0, first.err
    result = json.loads((tmp_path / "kept" / "coco_eval.json").read_text())
    assert [row["evaluator"] for row in result["rows"]] == ["pycocotools", "faster-coco-eval"]
    assert result["rows"][0]["AP"] == pytest.approx(result["rows"][1]["AP"], abs=1e-12)
    assert result["machine"]["cores"] >= 1
    assert result["command"] == "sis-lightning bench --eval --images 2"
    other = {**result, "name": "other", "title": "Something else"}
    (tmp_path / "kept" / "other.json").write_text(json.dumps(other))
    assert command("bench", "--eval", "--images", "1", "--out", "kept").code == 0
    readme = (tmp_path / "kept" / "README.md").read_text()
    assert "## Something else" in readme
    assert "| faster-coco-eval |" in readme
    assert "1 images × 80 classes × 36 boxes" in readme

    assert command("bench").code == 2
    assert command("bench", "--eval", "--images", "0").code == 2
    (tmp_path / "kept" / "other.json").write_text("{}")
    spoilt = command("bench", "--eval", "--images", "1", "--out", "kept")
    assert spoilt.code == 1
    assert "other.json is not the result of a benchmark" in spoilt.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU")
@pytest.mark.parametrize("what", [["--operators"], ["sis50", "resnet50"]])
def test_a_missing_device_is_reported_at_once(command, what):
    result = command("bench", *what, "--device", "cuda")
    assert (result.code, result.err) == (2, "sis-lightning: device is cuda, but torch finds no GPU here\n")


def test_data_of_no_task_is_refused(command, tmp_path):
    result = command("bench", "--data", tmp_path)
    assert result.code == 2
    assert "the data of no task" in result.err


def test_the_data_at_coco_s_size_is_sound(tmp_path):
    _write_coco(tmp_path / "coco", 60)
    boxes, people = COCODetectionDataset(tmp_path), COCOKeypointsDataset(tmp_path)
    assert (boxes.defects, people.defects) == ([], [])
    assert (len(boxes), len(boxes.annotations.image)) == (60, 60 * 860_001 // 118_287)
    assert len(people) == 60 * 149_813 // 118_287
    assert boxes[59]["image"].shape == (3, 48, 64)
