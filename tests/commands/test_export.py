"""`sis-lightning export`, and runs that are tested in their deployed form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

RUNS = {
    "cls_cifar100": ("onnx", "pt2"),
    "seg_voc": ("onnx", "pt2"),
    "kpt_coco": ("onnx", "pt2"),
    "det_voc": ("onnx",),
}


@pytest.mark.parametrize("task", RUNS)
def test_a_run_is_tested_deployed_and_then_exported(command, small, tmp_path, task):
    import onnxruntime

    options = [*small(task, steps=3), "--run_dir", "run"]
    assert command("fit", *options).code == 0
    plain = command("test", *options)
    record = json.loads(Path("run/test.json").read_text())
    deployed = command("test", *options, "--deploy", "true")
    assert deployed.code == plain.code == 0, deployed.err
    again = json.loads(Path("run/test.json").read_text())
    assert again["metrics"] == pytest.approx(record["metrics"], abs=0.01)
    for kind in RUNS[task]:
        # A machine may lack the devices on which the run was trained.
        gpu = ["--trainer.accelerator", "gpu", "--trainer.devices", "4"]
        result = command("export", "--ckpt", "run/checkpoints/last.ckpt", "--format", kind, *gpu)
        assert result.code == 0, result.err
        assert f"run/model.{kind}" in result.out
        assert "verified on images of shape" in result.out
    session = onnxruntime.InferenceSession("run/model.onnx", providers=["CPUExecutionProvider"])
    known = json.loads(session.get_modelmeta().custom_metadata_map["sis_lightning"])
    assert known["checkpoint"] == {"file": "last.ckpt", "step": 3}
    assert "standard deviation" in known["preprocessing"]
    assert list(known["outputs"]) == [output.name for output in session.get_outputs()]
    if "pt2" in RUNS[task]:
        extra = {"metadata.json": ""}
        torch.export.load("run/model.pt2", extra_files=extra)
        assert json.loads(extra["metadata.json"]) == known
    else:
        refused = command("export", "--ckpt", "run/checkpoints/last.ckpt", "--format", "pt2")
        assert refused.code == 2
        assert "onnx" in refused.err.lower()
    assert [path.name for path in Path("run").glob(".*partial")] == []


def test_export_says_what_is_missing(command, tmp_path):
    unnamed = command("export")
    assert unnamed.code == 2
    assert "export needs a checkpoint" in unnamed.err
    gone = command("export", "--ckpt", "gone/last.ckpt")
    assert gone.code == 1
    assert "there is no checkpoint gone/last.ckpt" in gone.err
    (tmp_path / "alone.ckpt").write_bytes(b"")
    alone = command("export", "--ckpt", "alone.ckpt")
    assert alone.code == 2
    assert "not in the directory of a run" in alone.err
    (tmp_path / "folder").mkdir()
    assert "there is no checkpoint folder/checkpoints/last.ckpt" in command("export", "--ckpt", "folder").err
    missing = command("export", "--config", "tasks/cls_cifar100.yaml", "--config", "configs/demo.yaml")
    assert missing.code == 1
    assert "no checkpoint" in missing.err
