"""Run options, and the effect of each run and Trainer option."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jsonargparse.typing import NonNegativeInt, PositiveInt

from sis_lightning.option_effects import Effect


@dataclass(frozen=True)
class RunOptions:
    """Name and directory of a run, and how it is resumed.

    Args:
        seed_everything: Seed of all random numbers. It is also part of the default `run_dir`.
        task: Name of the task in the default `run_dir`. With `--config tasks/NAME.yaml`, it is NAME.
        run_dir: The run's directory. None: `runs/TASK/BACKBONE-OPERATOR/seedN`.
        overwrite: For fit: whether an earlier run in the directory is deleted, and training starts from the beginning.
        resume: For fit: `auto` resumes the run in the directory if there is one, and starts one otherwise. `never`
            starts a run, and is an error if the directory holds one. The path of a checkpoint resumes from it.
        resume_changed: For fit: whether a run may be resumed although its configuration has changed.
        checkpoint_every: For fit: number of steps between two checkpoints.
        max_restarts: For fit in a SLURM job: maximum number of times that the job requeues itself.
        ckpt_path: For validate, test and predict: `last` or `best` checkpoint of the run, or the path of a checkpoint.
            None: `last`.
        deploy: For validate, test and predict: whether the deployed (fused) model is used.
        output: For predict: folder into which the predictions are written. None: `predictions/` in the run's directory.
        coco_json: For predict: whether the predictions are also written as a COCO file, `coco.json`: boxes, keypoints,
            or the regions of classes, run-length encoded.
        verbose: For validate and test: whether all metrics are printed as a table.
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
    output: str | None = None
    coco_json: bool = False
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
        "output": Effect.NOTHING,
        "coco_json": Effect.NOTHING,
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
    # On several devices each normalises its own part of the batch, or all together.
    "sync_batchnorm": Effect.RESULT,
    # How the numbers are computed.
    "precision": _effect_of_precision,
    "deterministic": Effect.NUMERICS,
    "benchmark": Effect.NUMERICS,
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
