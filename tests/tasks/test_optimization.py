"""Learning rates, schedules, precisions and starting weights, in any Trainer."""

from __future__ import annotations

import functools

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR
from torch.utils.data import DataLoader, IterableDataset

from sis_lightning.backbones import backbone_config
from sis_lightning.errors import DataError, UsageError
from sis_lightning.tasks import ClassificationTask, DetectionTask
from sis_lightning.tasks.base import weights_deferred

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*You defined a `validation_step`.*"
)

SMALL = backbone_config("sis_demo", channels=8, width=4)
SGD = functools.partial(torch.optim.SGD, lr=0.01)


def classification(**options) -> ClassificationTask:
    return ClassificationTask(**{"backbone": SMALL, "num_classes": 3, "optimizer": SGD, **options})


def loader(count: int = 16) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return DataLoader([{"image": image, "label": i % 3} for i, image in enumerate(images)], batch_size=4)


@pytest.mark.parametrize("decayed", [False, True])
def test_weight_decay_of_norm_layers(tmp_path, decayed):
    sgd = functools.partial(torch.optim.SGD, lr=0.0625, weight_decay=0.5)
    task, run = classification(optimizer=sgd, norm_weight_decay=decayed), trainer(tmp_path, max_steps=0)
    run.fit(task, loader())
    before = {name: weight.detach().clone() for name, weight in task.named_parameters()}
    for weight in task.parameters():
        weight.grad = torch.zeros_like(weight)
    run.optimizers[0].step()
    for name, weight in task.named_parameters():
        layer = task.get_submodule(name.rpartition(".")[0])
        factor = 1 if isinstance(layer, torch.nn.BatchNorm2d) and not decayed else 1 - 0.0625 * 0.5
        torch.testing.assert_close(weight.detach(), before[name] * factor)


class Rates(Callback):
    """Keeps the learning rate of each step, and that after each validation."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append(trainer.optimizers[0].param_groups[0]["lr"])


def trainer(tmp_path, *callbacks: Callback, **options) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    usual = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path, "callbacks": list(callbacks)}
    return Trainer(**{**usual, **quiet, "num_sanity_val_steps": 0, **options})


@pytest.mark.parametrize(("accumulate", "images"), [(1, 4), (3, 12), (100, 16)])
def test_the_linear_rule_counts_the_images_of_a_real_step(tmp_path, accumulate, images):
    task, run = classification(lr_batch_size=8), trainer(tmp_path, accumulate_grad_batches=accumulate)
    run.fit(task, loader())
    assert task.images_per_step == images
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * images / 8)


def test_the_linear_rule_scales_the_maximum_of_one_cycle(tmp_path):
    cycle = functools.partial(OneCycleLR, max_lr=0.1, total_steps=4)
    task, run = classification(lr_batch_size=8, lr_scheduler=cycle, lr_interval="step"), trainer(tmp_path)
    run.fit(task, loader())
    assert run.optimizers[0].param_groups[0]["max_lr"] == pytest.approx(0.05)


def test_a_loader_without_batch_size_is_refused_by_the_linear_rule_only(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(loader())

    batches = DataLoader(Stream(), batch_size=None)
    trainer(tmp_path, max_steps=1).fit(classification(), batches)
    with pytest.raises(UsageError, match="no batch_size, which the linear learning rate rule needs"):
        trainer(tmp_path, max_steps=1).fit(classification(lr_batch_size=8), batches)


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("kind", [ReduceLROnPlateau, torch.optim.lr_scheduler.ReduceLROnPlateau])
def test_reduce_on_plateau_follows_a_metric_that_should_rise(tmp_path, kind, interval):
    monitor = {"monitor": "val/top1"} if kind is ReduceLROnPlateau else {}
    task = classification(lr_scheduler=functools.partial(kind, patience=0, factor=0.5, **monitor))
    values = iter([0.1, 0.2, 0.2, 0.3, 0.2])
    task.val_metrics.compute = lambda: {"top1": next(values)}
    rates = Rates()
    run = trainer(tmp_path, rates, max_epochs=4 * interval, limit_train_batches=1, check_val_every_n_epoch=interval)
    run.fit(task, loader(), loader(4))
    assert rates.steps[::interval] == pytest.approx([0.01, 0.01, 0.01, 0.005])
    assert task.notes["learning rate"] == "falls when val/top1 no longer rises"
    # A resumed run has the same state.
    run.save_checkpoint(tmp_path / "half.ckpt")
    again = classification(lr_scheduler=functools.partial(kind, patience=0, factor=0.5, **monitor))
    again.val_metrics.compute = lambda: {"top1": next(values)}
    more = trainer(tmp_path, max_epochs=5 * interval, limit_train_batches=1, check_val_every_n_epoch=interval)
    more.fit(again, loader(), loader(4), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert more.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0025)


def test_reduce_on_plateau_without_its_metric(tmp_path):
    task = classification(lr_scheduler=functools.partial(ReduceLROnPlateau, monitor="val/miou"))
    with pytest.raises(UsageError, match=r"no metric 'val/miou' to follow; known: .*val/top1"):
        trainer(tmp_path).fit(task, loader(), loader(4))


def test_one_cycle_says_that_the_optimizers_rate_has_no_effect(tmp_path):
    cycle = functools.partial(OneCycleLR, max_lr=0.1, total_steps=4)
    task = classification(lr_scheduler=cycle, lr_interval="step")
    trainer(tmp_path).fit(task, loader())
    assert task.notes["learning rate"] == "max_lr 0.1 of OneCycleLR; the optimizer's lr has no effect"
    same = classification(lr_scheduler=functools.partial(OneCycleLR, max_lr=0.01, total_steps=4), lr_interval="step")
    trainer(tmp_path).fit(same, loader())
    assert "learning rate" not in same.notes


@pytest.mark.parametrize(
    ("scheduler", "warmup", "shares"),
    [
        (None, 0, [1, 1, 1, 1]),
        (None, 2, [0.5, 0.75, 1, 1]),
        (functools.partial(MultiStepLR, milestones=[2]), 0, [1, 1, 0.1, 0.1]),
        (functools.partial(OneCycleLR, max_lr=1.0, total_steps=40), 0, None),
    ],
)
def test_the_learning_rate_finder_sets_the_rate_of_every_schedule(tmp_path, scheduler, warmup, shares):
    finder, rates = (
        LearningRateFinder(num_training_steps=30, min_lr=1e-4, max_lr=0.1, early_stop_threshold=None),
        Rates(),
    )
    task = classification(lr_scheduler=scheduler, lr_interval="step", warmup_steps=warmup, warmup_start=0.5)
    run = trainer(tmp_path, finder, rates, max_epochs=10, limit_val_batches=0)
    run.fit(task, loader())
    assert task.learning_rate == finder.optimal_lr.suggestion()
    if shares is None:
        assert max(rates.steps) == pytest.approx(task.learning_rate, rel=0.02)
    else:
        assert rates.steps[:4] == pytest.approx([share * task.learning_rate for share in shares])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed"])
def test_classification_trains_in_every_precision(tmp_path, precision):
    task = classification()
    trainer(tmp_path, precision=precision, max_steps=2).fit(task, loader(), loader(4))
    assert torch.isfinite(torch.stack([weight.abs().max().float() for weight in task.parameters()])).all()
    assert sum(task.predict(torch.zeros(3, 32, 32, dtype=torch.uint8)).probabilities.tolist()) == pytest.approx(
        1, abs=0.01
    )


def test_detection_trains_in_true_half_precision(tmp_path):
    sizes = {"min_size": 64, "max_size": 64, "fpn_channels": 8, "head_channels": 8}
    task = DetectionTask(SMALL, 3, optimizer=SGD, **sizes)
    row = {
        "image": torch.randint(256, (3, 64, 64), dtype=torch.uint8),
        "boxes": torch.tensor([[4.0, 4, 50, 60]]),
        "labels": torch.tensor([2]),
    }
    batches = DataLoader([row] * 4, batch_size=2, collate_fn=lambda rows: {key: [r[key] for r in rows] for key in row})
    run = trainer(tmp_path, precision="bf16-true")
    run.fit(task, batches, batches)
    assert "val/AP" in run.callback_metrics


def test_starting_weights_are_loaded_once_and_not_for_checkpoints(tmp_path):
    with pytest.raises(DataError, match="no such file or run folder"):
        classification(backbone_weights=str(tmp_path / "gone.pth"))
    with pytest.raises(UsageError, match="weights and backbone_weights are both given"):
        classification(backbone_weights="a", weights="b")
    source = classification()
    torch.save(source.backbone.state_dict(), tmp_path / "body.pth")
    task = classification(backbone_weights=str(tmp_path / "body.pth"))
    assert torch.equal(task.backbone.stem.conv.weight, source.backbone.stem.conv.weight)
    run = trainer(tmp_path, max_steps=1)
    run.fit(task, loader())
    run.save_checkpoint(tmp_path / "task.ckpt")
    trained = task.backbone.stem.conv.weight.clone()
    (tmp_path / "body.pth").unlink()
    trainer(tmp_path, max_steps=1, limit_train_batches=0).fit(task, loader())
    assert torch.equal(task.backbone.stem.conv.weight, trained)
    again = ClassificationTask.load_from_checkpoint(tmp_path / "task.ckpt")
    assert torch.equal(again.backbone.stem.conv.weight, trained)
    with weights_deferred():
        later = classification(backbone_weights=str(tmp_path / "body.pth"))
    with pytest.raises(DataError, match="no such file"):
        trainer(tmp_path, max_steps=1).fit(later, loader())


def test_the_cifar_recipe_follows_the_linear_rule_from_batch_64(command, synthetic):
    """0.05 for batch 64, so 0.1 for 128, as in the code of ResNeXt; here 0.00625 for 8."""
    options = [
        "--config",
        "tasks/cls_cifar100.yaml",
        "--trainer",
        "cpu",
        "--data.root",
        synthetic,
        "--data.num_workers",
        0,
    ]
    options += ["--data.batch_size", 8, "--trainer.max_steps", 1, "--trainer.limit_val_batches", 0]
    fit = command("fit", *options, "--model.backbone.channels", 8, "--model.backbone.width", 4)
    assert fit.code == 0, fit.err
    assert "0.00625 at the start (linear rule from batch 64)" in fit.out
