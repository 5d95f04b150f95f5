"""Run options, and the effect of each run and Trainer option."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jsonargparse.typing import NonNegativeInt, PositiveInt

from sis_lightning.option_effects import Effect


@dataclass(frozen=True)
class RunOptions:
    """Name, directory and resume of a run.

    Args:
        seed_everything: Seed of all random numbers; also names the run's directory.
        task: First folder of the run's directory below `runs/`.
        run_dir: The run's directory; by default `runs/TASK/BACKBONE-OPERATOR/seedN`.
        overwrite: fit: whether an earlier run in the directory is removed.
        resume: fit: `auto` (resumes the directory's run, if there is one), `never`, or a checkpoint file.
        resume_changed: fit: whether a run may be resumed under a changed configuration.
        checkpoint_every: fit: number of steps between two checkpoints.
        max_restarts: fit: maximum number of requeues of a job by SLURM.
        ckpt_path: validate, test, predict: `last` (default), `best`, or a checkpoint file.
        deploy: validate, test, predict: whether the deployed (fused) form of the network is used.
        verbose: validate, test: whether all metrics are printed as a table.
    """

    seed_everything: NonNegativeInt = 0
    task: str = "run"
    run_dir: str | None = None
    overwrite: bool = False
    resume: str = "never"
    resume_changed: bool = False
    checkpoint_every: PositiveInt = 500
    max_restarts: NonNegativeInt = 100
    ckpt_path: str | None = None
    deploy: bool = False
    verbose: bool = True

    option_effects: ClassVar[Mapping[str, Effect]] = {
        "seed_everything": Effect.RESULT,
        "task": Effect.NOTHING,
        "run_dir": Effect.NOTHING,
        "overwrite": Effect.NOTHING,
        "resume": Effect.NOTHING,
        "resume_changed": Effect.NOTHING,
        "checkpoint_every": Effect.NOTHING,
        "max_restarts": Effect.NOTHING,
        "ckpt_path": Effect.NOTHING,
        "deploy": Effect.NOTHING,
        "verbose": Effect.NOTHING,
    }


def _effect_of_precision(value: Any) -> Effect:
    """Mixed precisions keep the weights in 32 bits; networks whose weights are 16-bit learn and predict otherwise."""
    keeps_weights = value is None or str(value) in ("32", "32-true", "64", "64-true", "16", "16-mixed", "bf16-mixed")
    return Effect.NUMERICS if keeps_weights else Effect.RESULT


#: Plugins, by the ends of their names, that keep the weights in 32 or more bits.
_PLUGINS_THAT_KEEP_WEIGHTS = ("Environment", "CheckpointIO", "SyncBatchNorm", "MixedPrecision", "DoublePrecision")


def _effect_of_plugins(value: Any) -> Effect:
    """Plugins for precision may store the weights in fewer bits, as `precision: 16-true` does; others do not."""
    plugins = value if isinstance(value, list) else [value]
    names = [str(item.get("class_path") if isinstance(item, Mapping) else item) for item in plugins if item]
    return Effect.NUMERICS if all(name.endswith(_PLUGINS_THAT_KEEP_WEIGHTS) for name in names) else Effect.RESULT


#: Effect of each option of Lightning's Trainer, which does not declare them. A function decides by the value.
TRAINER_EFFECTS: Mapping[str, Effect | Callable[[Any], Effect]] = {
    # Where and on how many devices: the batch is that of all devices together, whatever their number.
    "accelerator": Effect.NOTHING,
    "strategy": Effect.NOTHING,
    "devices": Effect.NOTHING,
    "num_nodes": Effect.NOTHING,
    # How the numbers are computed.
    "precision": _effect_of_precision,
    "deterministic": Effect.NUMERICS,
    "benchmark": Effect.NUMERICS,
    "sync_batchnorm": Effect.NUMERICS,
    "plugins": _effect_of_plugins,
    # What is logged and displayed.
    "logger": Effect.NOTHING,
    "log_every_n_steps": Effect.NOTHING,
    "enable_progress_bar": Effect.NOTHING,
    "enable_model_summary": Effect.NOTHING,
    "enable_checkpointing": Effect.NOTHING,
    "enable_autolog_hparams": Effect.NOTHING,
    "model_registry": Effect.NOTHING,
    "default_root_dir": Effect.NOTHING,
    "profiler": Effect.NOTHING,
    "detect_anomaly": Effect.NOTHING,
    "num_sanity_val_steps": Effect.NOTHING,
    "inference_mode": Effect.NOTHING,
    # How long and how the network is trained.
    "max_epochs": Effect.RESULT,
    "min_epochs": Effect.RESULT,
    "max_steps": Effect.RESULT,
    "min_steps": Effect.RESULT,
    "max_time": Effect.RESULT,
    "limit_train_batches": Effect.RESULT,
    "limit_val_batches": Effect.RESULT,
    "limit_test_batches": Effect.RESULT,
    "limit_predict_batches": Effect.RESULT,
    "overfit_batches": Effect.RESULT,
    "fast_dev_run": Effect.RESULT,
    "barebones": Effect.RESULT,
    "val_check_interval": Effect.RESULT,
    "check_val_every_n_epoch": Effect.RESULT,
    "accumulate_grad_batches": Effect.RESULT,
    "gradient_clip_val": Effect.RESULT,
    "gradient_clip_algorithm": Effect.RESULT,
    "use_distributed_sampler": Effect.RESULT,
    "reload_dataloaders_every_n_epochs": Effect.RESULT,
    "callbacks": Effect.RESULT,
}
