"""What Lightning, jsonargparse and torch raise for a mistake becomes a short message that names the option."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sis_lightning.errors import DataError, UsageError
from sis_lightning.run.library_errors import explained


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.devices", "1.5"], ["trainer.devices is 1.5", "int > 0"]),
        (["--trainer.accelerator", "tpux"], ["trainer.accelerator is tpux", "cpu"]),
        (["--trainer.strategy", "ddpx"], ["trainer.strategy is ddpx"]),
        (["--trainer.strategy", "fsdp"], ["trainer.strategy is fsdp", "ddp"]),
        (["--trainer.barebones", "true"], ["trainer.barebones", "leave it out"]),
        (["--trainer.overfit_batches", "1"], ["trainer.overfit_batches", "configs/overfit.yaml"]),
        (["--trainer.enable_checkpointing", "false"], ["trainer.enable_checkpointing"]),
        (["--trainer.profiler", "simplex"], ["trainer.profiler is simplex", "simple"]),
        (["--trainer.gradient_clip_algorithm", "foo"], ["trainer.gradient_clip_algorithm is foo", "norm"]),
        (["--trainer.precision", "17"], ["trainer.precision is 17", "bf16-mixed"]),
        (["--trainer.callbacks", "EarlyStoping"], ["trainer.callbacks", "EarlyStopping"]),
        (["--model.optimizer", "Adamm"], ["model.optimizer", "'Adamm'", "'Adam'"]),
        (["--model.lr_scheduler", "StepLr"], ["model.lr_scheduler", "'StepLR'"]),
        (["--model", "SegmentationTsk"], ["SegmentationTask"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_an_invalid_option_is_named(command, tiny, options, words):
    result = command("fit", *tiny, *options)
    assert result.code == 2, result.err
    assert all(word in result.err for word in words), result.err
    assert len(result.err.splitlines()) <= 5, result.err
    assert "DataModule" not in result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("logger", "package"), [("lightning.pytorch.loggers.WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")]
)
def test_a_logger_whose_package_is_not_installed(command, tiny, logger, package):
    if find_spec(package):
        pytest.skip(f"{package} is installed here")
    result = command("fit", *tiny, "--trainer.logger", logger)
    assert result.code == 2, result.err
    assert f"trainer.logger is {logger.rpartition('.')[2]}" in result.err
    assert f"pip install {package}" in result.err
    assert len(result.err.splitlines()) <= 5


def test_a_metric_that_is_not_logged(command, tiny):
    result = command("fit", *tiny, "--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val_loss")
    assert result.code == 2, result.err
    assert "trainer.callbacks is EarlyStopping" in result.err
    assert "val_loss" in result.err
    assert "val/miou" in result.err
    assert len(result.err.splitlines()) <= 5


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions_train(command, tiny, precision):
    result = command("fit", *tiny, "--trainer.precision", precision)
    assert result.code == 0, result.err


def test_the_learning_rate_finder_runs(command, tiny):
    finder = ["--trainer.callbacks", "LearningRateFinder", "--trainer.callbacks.num_training_steps", "3"]
    result = command("fit", *tiny, *finder)
    assert result.code == 0, result.err
    assert "finished after 4 steps" in result.out


def test_the_simple_profiler_reports_and_the_summary_is_printed(command, tiny):
    result = command("fit", *tiny, "--trainer.profiler", "simple", "--trainer.enable_model_summary", "true")
    assert result.code == 0, result.err
    assert "run_training_batch" in result.out
    assert "Trainable params" in result.out


def test_our_own_errors_and_defects_pass_through():
    with pytest.raises(DataError, match="as it was"), explained():
        raise DataError("as it was")
    with pytest.raises(ZeroDivisionError), explained():
        _ = 1 / 0
    with pytest.raises(ValueError, match="a defect"), explained():
        raise ValueError("a defect of this package")
    wrapped = ValueError("wrapped by jsonargparse")
    wrapped.__cause__ = UsageError("inner")
    with pytest.raises(UsageError, match="inner"), explained():
        raise wrapped


def test_too_little_memory_is_said_in_words():
    with pytest.raises(DataError, match=r"memory does not suffice: CUDA out of memory"), explained():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has …")


def test_a_worker_killed_while_a_checkpoint_is_saved_is_no_failure_of_the_disk():
    with pytest.raises(DataError, match="a worker process that loads data was killed by signal Killed"), explained():
        raise DataError("run/last.ckpt cannot be saved: DataLoader worker (pid 7) is killed by signal: Killed. ")


@pytest.mark.parametrize(
    "wrong", [["--model.optimizer.lr", "-1"], ["--model.num_classes", "5"], ["--model.weights", "gone.ckpt"]], ids=str
)
def test_a_run_that_fails_before_its_first_step_leaves_nothing(command, tiny, wrong):
    result = command("fit", *tiny, *wrong, "--run_dir", "run")
    assert result.code in (1, 2), result.err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "text",
    [
        "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_full_shared_memory_is_told_from_that_of_a_gpu(text):
    with pytest.raises(DataError, match="by which workers send batches, is full"), explained():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="out of resource"), explained():
        raise RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448")


@pytest.mark.parametrize(
    "words",
    ["[/gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:50095", "Read error: Connection reset by peer"],
)
def test_a_rank_whose_peer_has_ended_says_so(words):
    with pytest.raises(DataError, match="this rank lost its connection to another one"), explained():
        raise RuntimeError(words)
