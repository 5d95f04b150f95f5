"""A contract with Lightning: what `lightning_internals` relies on, which another release may change."""

from __future__ import annotations

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from torch.utils.data import DataLoader

from sis_lightning import lightning_internals as internals

RELEASE = f"Lightning {lightning.__version__} has this otherwise: adapt sis_lightning/lightning_internals.py"


class Linear(LightningModule):
    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).mean()

    def validation_step(self, batch: torch.Tensor) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def trainer(tmp_path) -> Trainer:
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(torch.ones(6, 2), batch_size=2)
    trainer.fit(Linear(), loader, loader)
    return trainer


def test_the_loops_are_all_that_there_are(trainer):
    def below(loop: _Loop) -> set[_Loop]:
        inner = [value for value in vars(loop).values() if isinstance(value, _Loop)]
        return {loop}.union(*(below(value) for value in inner))

    assert set(internals.loops(trainer)) == below(trainer.fit_loop), RELEASE


def test_counts(trainer):
    progress = internals.batch_progress(trainer)
    assert (progress.total.completed, progress.total.ready, progress.current.ready) == (6, 6, 3), RELEASE
    assert internals.epochs_completed(trainer) == 2, RELEASE
    assert trainer.global_step == 4
    assert not internals.accumulates(trainer), "the last batch of an epoch makes a step"
    progress.current.ready = 1
    assert internals.accumulates(trainer)


def test_progress_is_restored_without_a_restart(trainer):
    state = trainer.fit_loop.state_dict()
    internals.batch_progress(trainer).total.completed = 0
    internals.loops(trainer)[-1].restarting = True
    internals.restore_progress(trainer, state)
    assert internals.batch_progress(trainer).total.completed == 6, RELEASE
    assert [loop.restarting for loop in internals.loops(trainer)] == [False, False, False, False, True], RELEASE


@pytest.mark.parametrize("point", ["batch", "validation", "end"])
def test_the_saved_position(trainer, point):
    checkpoint = {"loops": {"fit_loop": trainer.fit_loop.state_dict()}}
    before = {key: dict(value) for key, value in checkpoint["loops"]["fit_loop"].items()}
    internals.keep_saved_position(checkpoint, point)
    state = checkpoint["loops"]["fit_loop"]
    assert set(state) == set(before), RELEASE
    batches = state["epoch_loop.batch_progress"]
    assert set(batches["total"]) == {"ready", "started", "processed", "completed"}, RELEASE
    if point == "batch":
        assert batches["is_last_batch"] is False
        assert set(batches["current"].values()) == {3}
    if point == "validation":
        assert state["epoch_loop.val_loop.batch_progress"]["current"]["ready"] == 1


class Logs(Linear):
    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss = super().training_step(batch)
        self.log_dict({"first": loss, "second": loss.detach() ** 2}, on_step=True, on_epoch=True, reduce_fx="max")
        self.log("mean", loss, on_epoch=True)
        return loss


def test_logged_values_are_restored(trainer, tmp_path):
    class Takes(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            if trainer.fit_loop.total_batch_idx == 7:
                self.values = internals.logged_values(trainer)
                torch.save(self.values, tmp_path / "values.pt")

    loader, takes = DataLoader(torch.randn(6, 2), batch_size=2), Takes()
    trainer.callbacks, trainer.fit_loop.max_epochs = [takes], 3
    trainer.fit(Logs(), loader, loader)
    values = torch.load(tmp_path / "values.pt", weights_only=True)
    assert len(values["sums"]) == 3, RELEASE
    assert {"first_step", "second_step", "mean_step"} <= set(values["newest"]["_callback_metrics"]), RELEASE
    # Into another Trainer, whose values are then these, with the same functions that reduce and synchronise them.
    other = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    internals.restore_logged_values(other, values)
    again = internals.logged_values(other)
    assert again.keys() == values.keys()
    for one, two in zip(values["sums"], again["sums"], strict=True):
        assert (one["key"], one["options"], one["sync"]) == (two["key"], two["options"], two["sync"]), RELEASE
        assert [torch.as_tensor(value or 0).tolist() for value in one["state"].values()] == [
            torch.as_tensor(value or 0).tolist() for value in two["state"].values()
        ], RELEASE
    assert other.callback_metrics.keys() == values["newest"]["_callback_metrics"].keys(), RELEASE


def test_a_validation_that_the_schedule_asks_for(trainer):
    class Stops(Callback):
        due: tuple[bool, ...] = ()

        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            trainer.should_stop = trainer.fit_loop.total_batch_idx == self.at

        def on_validation_start(self, trainer: Trainer, *_: object) -> None:
            if trainer.sanity_checking:
                return
            self.due = *self.due, internals.validation_is_due(trainer)
            assert trainer.should_stop == (len(self.due) == 2), RELEASE

    loader, stops = DataLoader(torch.ones(6, 2), batch_size=2), Stops()
    trainer.callbacks, trainer.fit_loop.max_epochs, stops.at = [stops], 4, 10
    trainer.fit(Linear(), loader, loader)
    assert stops.due == (True, False), RELEASE  # after an epoch, and after two batches of the next


def test_the_number_of_steps_can_be_lifted(trainer):
    trainer.fit_loop.epoch_loop.max_steps = 4
    internals.lift_max_steps(trainer)
    assert trainer.max_steps == -1, RELEASE
    assert internals.total_steps(trainer) == 4, RELEASE
    assert trainer.max_steps == -1
    internals.restore_max_steps(trainer)
    assert trainer.max_steps == 4, RELEASE
    internals.restore_max_steps(trainer)
    assert trainer.max_steps == 4


def test_other_ranks_can_be_killed(trainer):
    assert callable(_Launcher.kill), RELEASE
    internals.kill_other_ranks(trainer)  # of which there are none


def test_a_module_knows_whether_it_has_a_trainer(trainer):
    assert internals.attached_trainer(Linear()) is None, RELEASE
    assert internals.attached_trainer(trainer.lightning_module) is trainer, RELEASE


def test_hparams_are_replaced_for_checkpoints_and_loggers():
    module = Linear()
    assert dict(module.hparams) == {"size": 1}
    internals.replace_hparams(module, {"width": 2})
    assert (dict(module.hparams), dict(module.hparams_initial)) == ({"width": 2}, {"width": 2}), RELEASE


def test_the_training_loader_is_built_early(trainer):
    seen = []

    class Early(Linear):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            seen.append(internals.train_loader(self.trainer))
            return super().configure_optimizers()

    loader = DataLoader(torch.ones(6, 2), batch_size=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Early(), loader, loader)
    assert seen == [trainer.train_dataloader], RELEASE


def test_optimizers_are_configured_again(trainer):
    before = trainer.optimizers
    internals.restart_optimizers(trainer)
    assert trainer.optimizers is not before, RELEASE
    assert len(trainer.optimizers) == 1
