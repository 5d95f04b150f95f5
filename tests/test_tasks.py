"""Tasks: one backbone in all of them, losses against torch, optimisation as the recipe says."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch.nn import functional as F

from sis_lightning import BackboneConfig, create_backbone
from sis_lightning.backbones import backbone_config
from sis_lightning.datamodules import CIFAR100DataModule, VOCSegmentationDataModule
from sis_lightning.errors import UsageError
from sis_lightning.tasks import ClassificationTask, SegmentationTask

SMALL = backbone_config("sis_demo", channels=8, width=4)
SGD = functools.partial(torch.optim.SGD, lr=0.1)
DECODER = {"decoder_channels": 16, "decoder_atrous_rates": [1, 2, 3]}


def segmentation(**arguments) -> SegmentationTask:
    return SegmentationTask(**{"backbone": SMALL, "num_classes": 21, "optimizer": SGD, "decoder": DECODER, **arguments})


def classification(**arguments) -> ClassificationTask:
    return ClassificationTask(**{"backbone": SMALL, "num_classes": 100, "optimizer": SGD, **arguments})


def test_all_tasks_hold_the_same_backbone():
    want = {key: value.shape for key, value in create_backbone(SMALL).state_dict().items()}
    tasks = [segmentation(), classification()]
    for task in tasks:
        assert {key: value.shape for key, value in task.backbone.state_dict().items()} == want
    tasks[1].backbone.load_state_dict(tasks[0].backbone.state_dict())
    x = torch.randn(1, 3, 32, 32)
    one, other = (task.eval().backbone(x)["c4"] for task in tasks[::-1])
    assert one.shape == (1, 128, 2, 2)
    assert other.shape == (1, 128, 2, 2)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (17, 64)])
def test_segmentation_labels_images_of_any_size(height, width):
    task = segmentation().eval()
    image = torch.randn(1, 3, height, width)
    logits = task(image)
    assert logits.shape == (1, 21, height, width)
    padded = F.pad(image, (0, -width % 16, 0, -height % 16))
    torch.testing.assert_close(logits, task.model(padded)[..., :height, :width])


def test_segmentation_loss_is_weighted_cross_entropy():
    torch.manual_seed(0)
    task = segmentation(background_weight=0.25).eval()
    image, mask = torch.randn(2, 3, 32, 48), torch.randint(0, 21, (2, 32, 48), dtype=torch.uint8)
    mask[:, :9] = 255
    weight = torch.ones(21)
    weight[0] = 0.25
    want = F.cross_entropy(task(image), mask.long(), weight, ignore_index=255)
    torch.testing.assert_close(task.training_loss({"image": image, "mask": mask})["cross_entropy"], want)
    nothing = task.training_loss({"image": image, "mask": torch.full_like(mask, 255)})["cross_entropy"]
    assert nothing == 0


def test_classification_counts_top_1_and_top_5():
    task = classification(num_classes=7)
    logits = torch.tensor(
        [[9.0, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], [3, 4, 5, 6, 7, 8, 9]]
    )
    task.forward = lambda images: logits
    batch = {"image": torch.zeros(4, 3, 8, 8), "label": torch.tensor([0, 4, 5, 6])}
    task.evaluate(batch, task.val_metrics)
    got = {key: round(float(value), 6) for key, value in task.val_metrics.compute().items()}
    assert got == {"top1": 0.5, "top1_error_percent": 50, "top5": 0.75, "top5_error_percent": 25}


def trainer(tmp_path, **arguments) -> Trainer:
    usual = {
        "accelerator": "cpu",
        "max_steps": 1,
        "default_root_dir": tmp_path,
        "limit_val_batches": 0,
        "logger": False,
    }
    quiet = dict.fromkeys(["enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    return Trainer(**{**usual, **quiet, **arguments})


@pytest.mark.parametrize(("lr_batch_size", "accumulate", "lr"), [(None, 1, 0.1), (8, 1, 0.05), (8, 3, 0.15)])
def test_the_linear_rule(synthetic, tmp_path, lr_batch_size, accumulate, lr):
    task = classification(lr_batch_size=lr_batch_size)
    run = trainer(tmp_path, accumulate_grad_batches=accumulate, max_epochs=1)
    run.fit(task, CIFAR100DataModule(str(synthetic), batch_size=4, num_workers=0))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr)


@pytest.mark.parametrize(("interval", "rates"), [("step", [0.1, 0.08, 0.06]), ("epoch", [0.1, 0.1, 0.1])])
def test_the_scheduler_counts_steps_or_epochs(synthetic, tmp_path, interval, rates):
    seen = []

    class Watched(ClassificationTask):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    poly = functools.partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=5, power=1)
    task = Watched(SMALL, 100, SGD, poly, lr_interval=interval)
    trainer(tmp_path, max_steps=3).fit(task, CIFAR100DataModule(str(synthetic), batch_size=4, num_workers=0))
    assert seen == pytest.approx(rates)
    assert ("ends at step 5, the run at 3" in task.schedule_note) == (interval == "step")


def test_a_schedule_that_ends_before_the_run_is_refused_where_it_cannot_go_on(synthetic, tmp_path):
    cycle = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=2)
    task = classification(lr_scheduler=cycle, lr_interval="step")
    with pytest.raises(UsageError, match="total_steps 3"):
        trainer(tmp_path, max_steps=3).fit(task, CIFAR100DataModule(str(synthetic), batch_size=4, num_workers=0))


def test_hparams_are_plain_data(tmp_path):
    for task in (segmentation(), classification()):
        torch.save(dict(task.hparams), tmp_path / "h.pt")
        loaded = torch.load(tmp_path / "h.pt", weights_only=True)
        assert BackboneConfig(**loaded["backbone"]) == SMALL
        assert "optimizer" not in loaded


def test_data_with_other_classes_is_refused(synthetic, tmp_path):
    with pytest.raises(UsageError, match=r"21 classes, the model 5.*num_classes 21"):
        trainer(tmp_path).fit(
            segmentation(num_classes=5), VOCSegmentationDataModule(str(synthetic), batch_size=2, num_workers=0)
        )


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: segmentation(num_classes=1), "num_classes"),
        (lambda: classification(num_classes=1), "num_classes"),
        (lambda: segmentation(background_weight=-1), "background_weight"),
        (lambda: segmentation(output_stride=12), "8 or 16"),
        (lambda: segmentation(architecture="unett", output_stride=32), "unet"),
        (lambda: segmentation(backbone=backbone_config("sis29")), "four-stage"),
    ],
)
def test_settings_that_cannot_be(build, words):
    with pytest.raises(UsageError, match=words):
        build()


@pytest.mark.parametrize("build", [segmentation, classification])
def test_pictures_are_drawn(synthetic, tmp_path, build):
    kind = VOCSegmentationDataModule if build is segmentation else CIFAR100DataModule
    data = kind(str(synthetic), batch_size=3, num_workers=0)
    task, run = build(), trainer(tmp_path)
    run.validate(task, data, verbose=False)  # attaches the data to the task
    task._trainer = run
    data.trainer = run
    task.eval()
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    figure = task.plot(batch, task.predict_step(batch))
    figure.savefig(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert np.asarray(image).std() > 10
    titles = [axis.get_title() for axis in figure.axes]
    assert any("true" in title or "truth" in title for title in titles)
