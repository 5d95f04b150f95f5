"""compare: it shows what differs, and refuses differences that are not allowed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import scipy.stats

from sis_lightning.run.record import read_record, write_record, write_with_checksum

CONFIG = ("--config", "tasks/seg_voc.yaml", "--rounds", 0)


def cells(out: str) -> dict[str, tuple[str, str]]:
    """The rows of the table that it prints."""
    rows = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in out.splitlines() if "│" in line]
    return {name: (left, right) for name, left, right, *_ in rows}


def test_operators_under_one_configuration(command):
    result = command("compare", "basic", "res2net50", *CONFIG)
    assert result.code == 0, result.err
    rows = cells(result.out)
    assert rows["operator"] == ("basic", "conv")
    # As `complexity` counts them.
    for name, side in (("basic", 0), ("conv", 1)):
        counted = command(
            *("complexity", "--config", "tasks/seg_voc.yaml", "--model.backbone.operator", name, "--json")
        )
        (size,) = json.loads(counted.out)
        assert rows["parameters, M"][side] == f"{size['model_parameters'] / 1e6:.3f}"
        assert rows["MACs, G"][side] == f"{size['model_macs'] / 1e9:.3f}"


def test_what_else_differs_is_refused_by_its_key_unless_allowed(command):
    refused = command("compare", "res2net50", "resnet50", *CONFIG)
    assert refused.code == 2
    assert "differ in more than the operator" in refused.err
    assert "model.init_args.backbone.family: 'res2net' of A, 'resnet' of B" in refused.err
    assert len(refused.err.splitlines()) <= 5
    assert command("compare", "res2net50", "resnet50", *CONFIG, "--allow", "family", "scale").code == 2
    allowed = command("compare", "res2net50", "resnet50", *CONFIG, "--allow", "family", "scale", "width")
    assert allowed.code == 0, allowed.err
    assert cells(allowed.out)["family"] == ("res2net", "resnet")
    assert command("compare", "res2net50", "resnet50", *CONFIG, "--allow", "backbone").code == 0
    assert "do not differ" in command("compare", "basic", "sis50", *CONFIG).err
    assert "neither an operator" in command("compare", "bacis", "conv", *CONFIG).err


@pytest.fixture
def runs(command, small) -> list[str]:
    """Three runs: another operator, and another operator under another configuration."""
    for name, options in {
        "a": ["--model.backbone.operator", "conv"],
        "b": ["--model.backbone.operator", "recurrent1"],
        "c": ["--model.backbone.operator", "recurrent1", "--model.label_smoothing", "0.1", "--seed_everything", "1"],
    }.items():
        every = [*small("cls_cifar100", 3), *options, "--run_dir", name]
        assert command("fit", *every).code == 0
        assert command("test", *every).code == 0
    return ["a", "b", "c"]


def test_runs(runs, command):
    result = command("compare", "a", "b/test.json", "--rounds", 1)
    assert result.code == 0, result.err
    rows = cells(result.out)
    records = [read_record(Path(name, "test.json")) for name in "ab"]
    top1 = tuple(f"{record.metrics['test/top1']:.4f}" for record in records)
    assert rows["test/top1"] == top1
    assert rows["operator"] == ("conv", "recurrent1")
    losses = [dict(record.curves["train/loss"]) for record in records]
    for step in losses[0]:
        assert rows[f"train/loss, step {step}"] == tuple(f"{loss[step]:.4f}" for loss in losses)
    assert any(name.startswith("backbone, images/s") for name in rows)
    assert "synthetic" in result.out

    refused = command("compare", "b", "c", "--rounds", 0)
    assert refused.code == 2
    assert "model.init_args.label_smoothing: 0.0 of A, 0.1 of B" in refused.err
    assert "seed_everything: 0 of A, 1 of B" in refused.err
    allowed = command("compare", "b", "c", "--rounds", 0, "--allow", "label_smoothing", "seed_everything")
    assert allowed.code == 0, allowed.err
    # Untested runs are compared by their configurations.
    for name, precision in {"a": "bf16-mixed", "b": "32-true"}.items():
        path = Path(name, "config.yaml")
        path.write_text(re.sub(r"(?m)^  precision: .*$", f"  precision: {precision}", path.read_text()))
        Path(name, "untested").mkdir()
        path.rename(Path(name, "untested", "config.yaml"))
    untested = command("compare", "a/untested", "b/untested", "--rounds", 0)
    assert untested.code == 2
    assert "trainer.precision: 'bf16-mixed' of A, '32-true' of B" in untested.err
    half = command("compare", "a", "b/untested", "--rounds", 0)
    assert half.code == 2
    assert "b/untested has not been tested, but the other run has" in half.err
    # An edited record is refused.
    path = Path("b/test.json")
    record = json.loads(path.read_text())
    record["data"]["fingerprint"] = "of other files"
    path.write_text(json.dumps(record))
    assert "checksum mismatch" in command("compare", "a", "b").err
    assert "no run in it" in command("compare", "a", ".").err
    assert command("compare", "a", "gone").code == 1


@pytest.fixture
def sets(command, small, monkeypatch, tmp_path) -> list[Path]:
    """Two sets of five seeds: records of one short run of each operator, with metrics of our own."""
    folders = []
    for number, operator in enumerate(("conv", "basic")):
        every = [*small("seg_voc", 2), "--model.backbone.operator", operator, "--run_dir", "run", "--overwrite", "true"]
        assert command("fit", *every).code == 0
        assert command("test", *every[:-2]).code == 0
        record = read_record(Path("run/test.json"))
        folders.append(Path(operator))
        for seed in range(5):
            metrics = {**record.metrics, "test/iou/cat": 0.5 * number, "test/pixel_accuracy": 0.5 + 0.01 * seed}
            metrics["test/miou"] = 0.3 + 0.1 * number + 0.01 * seed
            curves = {"val/miou": [(1, 0.1 * seed), (2, 0.2 * seed)]}
            config = {**record.config, "seed_everything": seed, "trainer": {**record.config["trainer"]}}
            config["trainer"]["log_every_n_steps"] = 1 + number  # as for the tables, it does not matter
            config["trainer"]["num_sanity_val_steps"] = number
            weights = record.checkpoint.model_copy(update={"sha256": f"{operator} {seed}"})
            changed = {"metrics": metrics, "curves": curves, "seed": seed, "config": config, "checkpoint": weights}
            write_record(folders[-1] / f"seed{seed}/test.json", record.model_copy(update=changed))
    return folders


def test_sets_of_seeds(sets, command):
    first, second = sets
    result = command("compare", first, second, "--rounds", 0, "--out", "curves.svg")
    assert result.code == 0, result.err
    values = [[0.3 + 0.1 * number + 0.01 * seed for seed in range(5)] for number in range(2)]
    expected = scipy.stats.ttest_ind(*values, equal_var=False).confidence_interval(0.95)
    row = next(line for line in result.out.splitlines() if "test/miou" in line)
    assert "0.3200 ± 0.0158" in row
    assert "0.4200 ± 0.0158" in row
    assert f"-0.1000 ({expected.low:+.4f} … {expected.high:+.4f}), a difference" in row
    same = next(line for line in result.out.splitlines() if "test/pixel_accuracy" in line)
    assert "no difference shown" in same
    # The class that differs most comes first.
    classes = re.findall(r"test/iou/(\w+)", result.out)
    assert classes[0] == "cat"
    assert len(classes) == 10
    assert "val/miou, step 2" in result.out
    assert "seed 0, 1, 2, 3, 4" in result.out
    assert Path("curves.svg").stat().st_size > 1000
    # Four seeds allow no statement.
    for folder in sets:
        (folder / "seed4/test.json").unlink()
    few = command("compare", first, second, "--rounds", 0).out
    row = next(line for line in few.splitlines() if "test/miou" in line)
    assert "0.3150 ± 0.0129" in row
    assert "difference" not in row


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"environment": {"packages": {"torch": "1.0"}}}, "torch: '1.0' of A"),
        (
            {"environment": {"code": {"sis_lightning": "1", "commit": "0" * 40, "dirty": False}}},
            "commit: '000000000000'",
        ),
        ({"environment": {"machine": {"device": "A100"}}}, "device: 'A100' of A"),
        ({"checkpoint": {"deployed": True}}, "deployed: True of A"),
        ({"checkpoint": {"finished": False}}, "finished: False of A"),
        ({"checkpoint": {"step": 1}}, "step: 1 of A"),
        ({"data": {"images": 7}}, "test images: 7 of A"),
    ],
)
def test_what_makes_metrics_incomparable_is_refused(change, key, sets, command):
    for seed in range(5):
        path = sets[0] / f"seed{seed}/test.json"
        content = json.loads(path.read_text())
        content.pop("checksum")
        for part, values in change.items():
            for name, value in values.items():
                content[part][name] = (
                    {**content[part][name], **value} if isinstance(value, dict) and name != "code" else value
                )
        write_with_checksum(path, content)
    refused = command("compare", *sets, "--rounds", 0)
    assert refused.code == 2
    assert key in refused.err
    # Within a set, too; and five copies of one run are no set.
    (sets[0] / "seed0/test.json").write_bytes((sets[1] / "seed0/test.json").read_bytes())
    refused = command("compare", *sets, "--rounds", 0)
    assert refused.code == 2
    assert "its runs are no set of seeds" in refused.err
    for seed in range(5):
        shutil.copy(sets[1] / "seed0/test.json", sets[0] / f"seed{seed}/test.json")
    refused = command("compare", *sets, "--rounds", 0)
    assert refused.code == 2
    assert "two of its runs have one seed or the same weights" in refused.err
