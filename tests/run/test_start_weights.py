"""Runs that start from the weights of another run, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from sis_lightning.files import digest
from sis_lightning.run.history import read_history
from sis_lightning.run.recipe import recipe

FIRST = Path("runs/cls_imagenet/res2net14-4w4s-basic-8ch/seed0")


@pytest.fixture
def later(small):
    """Options of a segmentation run that starts from the run of ImageNet."""
    return [*small("seg_voc", steps=2), "--config", "configs/from_imagenet.yaml"]


def backbone_of(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    start = next(key for key in state if key.endswith("stem.conv.weight")).removesuffix("stem.conv.weight")
    parts = ("stem", "stage")
    return {
        key.removeprefix(start): value
        for key, value in state.items()
        if key.startswith(start) and key.removeprefix(start).startswith(parts)
    }


def test_a_run_starts_from_the_finished_run_of_its_backbone(command, small, later):
    nothing = command("fit", *later)
    assert nothing.code == 1
    assert f"{FIRST} has no checkpoint" in nothing.err
    assert not list(Path("runs").rglob("config.yaml"))

    first = [*small("cls_imagenet", steps=4)]
    assert command("fit", *first, "--checkpoint_every", 1, "--trainer.limit_train_batches", 2).code == 0
    for name in ("last", "best"):  # as if it had been killed
        (FIRST / "checkpoints" / f"{name}.ckpt").unlink()
    middle = next((FIRST / "checkpoints").glob("step-*.ckpt"))
    middle.rename(FIRST / "checkpoints" / "last.ckpt")
    unfinished = command("fit", *later)
    assert unfinished.code == 1
    assert "has not finished (step" in unfinished.err

    assert command("fit", *first, "--overwrite", "true").code == 0
    # No step changes the weights: what the run ends with is what it started from.
    still = ["--model.lr_scheduler.init_args.max_lr", "1e-30", "--model.optimizer.init_args.weight_decay", "0"]
    done = command("fit", *later, *still)
    assert done.code == 0, done.err
    assert "loaded" in done.out
    run = Path("runs/seg_voc/res2net14-4w4s-basic-8ch/seed0")
    got, want = (backbone_of(path / "checkpoints" / "last.ckpt") for path in (run, FIRST))
    assert got.keys() == want.keys()
    same = [name for name in want if "running" not in name and "tracked" not in name]
    assert len(same) > 20
    for name in same:
        torch.testing.assert_close(got[name], want[name], msg=name)

    # The record says which weights these were, also of a run that was resumed.
    test = command("test", *later, *still)
    assert test.code == 0, test.err
    start = json.loads((run / "test.json").read_text())["training"]["start_weights"]
    config = yaml.safe_load((FIRST / "config.yaml").read_text())
    assert (start["source"], start["finished"]) == ("run:cls_imagenet", True)
    assert start["recipe_hash"] == digest(recipe(config))
    assert len(start["sha256"]) == 64
    assert len(start["trained_on"]) == 1
    # Where the weights are is no part of the recipe.
    assert (
        yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["backbone_weights"] == start["source"]
    )


def test_a_resumed_run_keeps_what_it_started_from(command, small, later):
    assert command("fit", *small("cls_imagenet", steps=2)).code == 0
    assert command("fit", *later, "--checkpoint_every", 1).code == 0
    run = Path("runs/seg_voc/res2net14-4w4s-basic-8ch/seed0")
    (run / "checkpoints" / "last.ckpt").unlink()  # as if it had been killed before its end
    for path in (run / "checkpoints").glob("step-*2.ckpt"):
        path.unlink()
    (FIRST / "checkpoints" / "last.ckpt").unlink()  # it is no longer needed
    resumed = command("fit", *later, "--checkpoint_every", 1, "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert len(read_history(run)) == 2
    point = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["run"]
    assert point["start_weights"]["source"] == "run:cls_imagenet"
