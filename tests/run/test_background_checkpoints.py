"""Checkpoints that are written while the training goes on: what they hold, when they are whole, and what fails."""

from __future__ import annotations

import copy
import sys
import threading
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from sis_lightning.errors import DataError
from sis_lightning.run.resume import checkpoints
from sis_lightning.run.resume.checkpoints import SafeCheckpointIO


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """An event before which nothing is written."""
    opened, save = threading.Event(), torch.save

    def waits(*arguments: object, **options: object) -> None:
        opened.wait()
        save(*arguments, **options)

    monkeypatch.setattr(checkpoints.torch, "save", waits)
    return opened


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_what_is_written_is_what_there_was_when_it_began(gate, tmp_path):
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    network[0].bias = network[1].bias  # tied
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    content = {"state_dict": network.state_dict(), "optimizer": optimizer.state_dict(), "counts": {"a": [1, (2, 3)]}}
    before = copy.deepcopy(content)
    files = SafeCheckpointIO(background=True)
    files.save_checkpoint(content, tmp_path / "a.ckpt")
    network(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    content["counts"]["a"].append(4)
    assert not torch.equal(before["state_dict"]["0.weight"], network.state_dict()["0.weight"])
    assert not (tmp_path / "a.ckpt").exists()
    gate.set()
    files.finish()
    got = read(tmp_path / "a.ckpt")
    assert isinstance(got["state_dict"], OrderedDict)
    assert got["state_dict"]._metadata == before["state_dict"]._metadata
    assert got["counts"] == before["counts"]
    for name, value in before["state_dict"].items():
        assert torch.equal(got["state_dict"][name], value), name
    for number, state in before["optimizer"]["state"].items():
        assert all(torch.equal(got["optimizer"]["state"][number][key], value) for key, value in state.items())
    assert got["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]
    nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).load_state_dict(got["state_dict"])


def test_one_is_written_at_a_time_and_what_follows_comes_after_it(gate, tmp_path):
    files, order = SafeCheckpointIO(background=True), []
    files.save_checkpoint({"number": 1}, tmp_path / "a.ckpt")
    files.then(lambda: order.append(sorted(path.name for path in tmp_path.iterdir())))
    second = threading.Thread(target=files.save_checkpoint, args=({"number": 2}, tmp_path / "b.ckpt"))
    second.start()
    second.join(0.3)
    assert second.is_alive()  # it waits for the first
    assert order == []
    gate.set()
    second.join()
    files.finish()
    assert order == [["a.ckpt"]]
    assert [read(tmp_path / name)["number"] for name in ("a.ckpt", "b.ckpt")] == [1, 2]
    # A file is read only when it is whole.
    gate.clear()
    files.save_checkpoint({"number": 3}, tmp_path / "b.ckpt")
    threading.Timer(0.2, gate.set).start()
    assert files.load_checkpoint(tmp_path / "b.ckpt")["number"] == 3


@pytest.mark.parametrize("ask", ["finish", "teardown", "check", "next"])
def test_a_failure_is_told_once_and_nothing_follows_it(gate, tmp_path, ask):
    files, order = SafeCheckpointIO(background=True), []
    gate.set()
    files.save_checkpoint({"number": 1}, tmp_path / "a.ckpt")
    files.finish()
    (tmp_path / ".a.ckpt.partial").mkdir()  # in the way
    files.save_checkpoint({"number": 2}, tmp_path / "a.ckpt")
    files.then(lambda: order.append("published"))

    def asked() -> None:
        if ask == "next":
            files.save_checkpoint({}, tmp_path / "b.ckpt")
        elif ask == "check":
            while files._newest is not None:
                files.check()
        else:
            getattr(files, ask)()

    with pytest.raises(DataError, match=r"a\.ckpt could not be written: Is a directory"):
        asked()
    assert order == []
    assert read(tmp_path / "a.ckpt")["number"] == 1
    files.finish()
    (tmp_path / ".a.ckpt.partial").rmdir()
    files.save_checkpoint({"number": 3}, tmp_path / "a.ckpt")
    files.finish()
    assert read(tmp_path / "a.ckpt")["number"] == 3


def test_a_run_trains_while_its_checkpoint_is_written(gate, command, small, monkeypatch):
    """The checkpoint of step 2 is held back until step 4 is done."""
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            seen.append((trainer.global_step, sorted(path.name for path in Path("run/checkpoints").glob("*.ckpt"))))
            if trainer.global_step == 4:
                gate.set()

    module = types.ModuleType("watch_of_the_test")
    module.Watch = Watch
    monkeypatch.setitem(sys.modules, "watch_of_the_test", module)
    options = [*small("seg_voc", steps=9), "--run_dir", "run", "--checkpoint_every", 2]
    options += ["--trainer.check_val_every_n_epoch", 100, "--trainer.limit_val_batches", 0]
    result = command("fit", *options, "--trainer.callbacks", "watch_of_the_test.Watch")
    assert result.code == 0, result.err
    assert [names for step, names in seen if step in (3, 4)] == [[], []]
    assert sorted(path.name for path in Path("run/checkpoints").glob("*.ckpt"))[-3:] == [
        "last.ckpt",
        "step-0000006.ckpt",
        "step-0000008.ckpt",
    ]
