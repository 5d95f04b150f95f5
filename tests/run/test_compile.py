"""Runs whose backbone is compiled."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("task", ["cls_cifar100", "seg_voc", "kpt_coco", "det_voc"])
def test_tasks_train_compiled_in_bfloat16(command, small, task, monkeypatch):
    # The code generator would take minutes; the operators' own test in tests/models runs it.
    real, modes = torch.compile, []

    def traced(function, mode):
        modes.append(mode)
        return real(function, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    options = [*small(task, steps=2), "--model.compile_mode", "default", "--trainer.precision", "bf16-mixed"]
    fit = command("fit", *options, "--run_dir", "run")
    assert fit.code == 0, fit.err
    assert modes == ["default"]
    # A run without compilation can read the checkpoint.
    test = command("test", *small(task, steps=2), "--run_dir", "run")
    assert test.code == 0, test.err
