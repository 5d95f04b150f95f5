"""Tasks: one backbone in all of them, losses against torch, optimisation as the recipe says."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch.nn import functional as F

from sis_lightning import BackboneConfig, create_backbone
from sis_lightning.backbones import backbone_config
from sis_lightning.backbones.weights import load_backbone_weights
from sis_lightning.datamodules import (
    CIFAR100DataModule,
    COCODetectionDataModule,
    COCOKeypointsDataModule,
    VOCSegmentationDataModule,
)
from sis_lightning.errors import DataError, UsageError
from sis_lightning.option_effects import Effect, effects_of
from sis_lightning.run.recipe import declared_effect
from sis_lightning.tasks import (
    BaseTask,
    ClassificationTask,
    DetectionTask,
    KeypointTask,
    SegmentationTask,
    predictions,
)
from sis_lightning.tasks import segmentation as segmentation_module

SMALL = backbone_config("sis_demo", channels=8, width=4)
SGD = functools.partial(torch.optim.SGD, lr=0.1)
DECODER = {"decoder_channels": 16, "decoder_atrous_rates": [1, 2, 3]}


def segmentation(**arguments) -> SegmentationTask:
    return SegmentationTask(**{"backbone": SMALL, "num_classes": 21, "optimizer": SGD, "decoder": DECODER, **arguments})


def classification(**arguments) -> ClassificationTask:
    return ClassificationTask(**{"backbone": SMALL, "num_classes": 100, "optimizer": SGD, **arguments})


def detection(**arguments) -> DetectionTask:
    sizes = {"min_size": 64, "max_size": 64, "fpn_channels": 8, "head_channels": 8}
    return DetectionTask(**{"backbone": SMALL, "num_classes": 80, "optimizer": SGD, **sizes, **arguments})


def keypoints(**arguments) -> KeypointTask:
    return KeypointTask(**{"backbone": SMALL, "optimizer": SGD, "deconv_channels": (8, 8, 8), **arguments})


BUILD = {"seg": segmentation, "cls": classification, "det": detection, "kpt": keypoints}


def test_every_task_is_among_them():
    assert {type(build()) for build in BUILD.values()} == set(BaseTask.__subclasses__()) - {Watched}


def test_all_tasks_hold_the_same_backbone():
    want = {key: value.shape for key, value in create_backbone(SMALL).state_dict().items()}
    for build in BUILD.values():
        assert {key: value.shape for key, value in build().backbone.state_dict().items()} == want


@pytest.mark.parametrize(("giver", "taker"), list(itertools.permutations(BUILD, 2)))
def test_a_checkpoint_of_one_task_starts_the_backbone_of_another(tmp_path, giver, taker):
    given, taken = BUILD[giver](), BUILD[taker]()
    torch.save({"state_dict": given.state_dict(), "global_step": 3}, tmp_path / "last.ckpt")
    others = {key: value.clone() for key, value in taken.state_dict().items() if ".backbone." not in key}
    load_backbone_weights(taken.backbone, tmp_path / "last.ckpt")
    want = given.backbone.state_dict()
    assert all(torch.equal(value, want[key]) for key, value in taken.backbone.state_dict().items())
    assert all(torch.equal(taken.state_dict()[key], value) for key, value in others.items())


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (17, 64)])
def test_segmentation_labels_images_of_any_size(height, width):
    task = segmentation().eval()
    image = torch.randn(1, 3, height, width)
    logits = task(image)
    assert logits.shape == (1, 21, height, width)
    padded = F.pad(image, (0, (1 - width) % 16, 0, (1 - height) % 16))
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


def test_the_dice_and_focal_losses_by_their_definitions():
    torch.manual_seed(0)
    shares = {"cross_entropy": 2.0, "dice": 0.5, "focal": 3.0}
    task = segmentation(losses=shares).eval()
    image, mask = torch.randn(2, 3, 32, 48), torch.randint(0, 5, (2, 32, 48), dtype=torch.uint8)
    mask[:, :9] = 255
    with torch.no_grad():
        parts = task.training_loss({"image": image, "mask": mask})
        probability = task(image).double().softmax(dim=1).permute(0, 2, 3, 1)[mask != 255].numpy()
    ids = mask[mask != 255].numpy()
    true = np.eye(21)[ids]
    chosen = probability[np.arange(len(ids)), ids]
    # Dice: 1 - 2 |p t| / (|p| + |t|) of each class over the batch, 0 for a class that does not occur; the mean of all.
    overlap, size = (probability * true).sum(0), (probability + true).sum(0)
    dice = np.where(true.sum(0) > 0, 1 - 2 * overlap / size, 0).mean()
    assert list(parts) == list(shares)
    assert parts["cross_entropy"].item() == pytest.approx(2 * -np.log(chosen).mean(), rel=1e-4)
    assert parts["dice"].item() == pytest.approx(0.5 * dice, rel=1e-4)
    # Focal: for each class a binary loss of its logit against all others, averaged over the classes (SMP's reading).
    with torch.no_grad():
        logits = task(image).double().permute(0, 2, 3, 1)[mask != 255].numpy()
    sure = np.where(true == 1, 1 / (1 + np.exp(-logits)), 1 - 1 / (1 + np.exp(-logits)))
    focal = (-((1 - sure) ** 2) * np.log(sure)).mean()
    assert parts["focal"].item() == pytest.approx(3 * focal, rel=1e-4)
    mask[:] = 255
    with torch.no_grad():
        nothing = segmentation(losses=shares).training_loss({"image": image, "mask": mask})
    assert all(value.item() == 0 for value in nothing.values())


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


class Watched(ClassificationTask):
    """Keeps the learning rate of every step."""

    def on_train_batch_start(self, batch, batch_idx):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


def watched(**arguments) -> Watched:
    task = Watched(**{"backbone": SMALL, "num_classes": 100, "optimizer": SGD, **arguments})
    task.rates = []
    return task


def test_the_warm_up_rises_linearly_beside_the_schedule(synthetic, tmp_path):
    epochs = functools.partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1], gamma=0.1)
    task = watched(lr_scheduler=epochs, lr_interval="epoch", warmup_steps=4, warmup_start=0.2)
    data = CIFAR100DataModule(str(synthetic), batch_size=4, num_workers=0)
    trainer(tmp_path, max_steps=8, limit_train_batches=6).fit(task, data)
    assert task.rates == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(("interval", "rates"), [("step", [0.1, 0.08, 0.06]), ("epoch", [0.1, 0.1, 0.1])])
def test_the_scheduler_counts_steps_or_epochs(synthetic, tmp_path, interval, rates):
    poly = functools.partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=5, power=1)
    task = watched(lr_scheduler=poly, lr_interval=interval)
    trainer(tmp_path, max_steps=3).fit(task, CIFAR100DataModule(str(synthetic), batch_size=4, num_workers=0))
    assert task.rates == pytest.approx(rates)
    assert ("ends at step 5, the run at 3" in task.notes.get("schedule", "")) == (interval == "step")


def test_one_cycle_must_not_end_before_the_run(synthetic, tmp_path):
    cycle = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=2)
    task = classification(lr_scheduler=cycle, lr_interval="step")
    with pytest.raises(UsageError, match="total_steps of lr_scheduler to 3"):
        trainer(tmp_path, max_steps=3).fit(task, CIFAR100DataModule(str(synthetic), batch_size=4, num_workers=0))


def test_hparams_are_plain_data(tmp_path):
    for task in (build() for build in BUILD.values()):
        torch.save(dict(task.hparams), tmp_path / "h.pt")
        loaded = torch.load(tmp_path / "h.pt", weights_only=True)
        assert BackboneConfig(**loaded["backbone"]) == SMALL
        assert loaded["optimizer"] == {"class_path": "torch.optim.sgd.SGD", "init_args": {"lr": 0.1}}
        assert loaded["in_channels"] == 3
        again = type(task)(**loaded)
        assert [value.shape for value in again.parameters()] == [value.shape for value in task.parameters()]
        assert again.meta == task.meta


def test_data_with_other_classes_is_refused(synthetic, tmp_path):
    with pytest.raises(UsageError, match=r"21 classes, but the network 5: set num_classes to 21"):
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
        (lambda: segmentation(losses={"dise": 1}), "there is no 'dise': did you mean 'dice'"),
        (lambda: segmentation(losses={"dice": 0}), "weight of dice is 0"),
        (lambda: segmentation(losses={}), "losses is empty"),
        (lambda: segmentation(architecture="unett", output_stride=32), "unet"),
        (lambda: segmentation(backbone=backbone_config("sis29")), "four-stage"),
    ],
)
def test_invalid_arguments(build, words):
    with pytest.raises(UsageError, match=words):
        build()


DATA = {
    "seg": VOCSegmentationDataModule,
    "cls": CIFAR100DataModule,
    "det": COCODetectionDataModule,
    "kpt": functools.partial(COCOKeypointsDataModule, input_size=(64, 32)),
}


@pytest.mark.parametrize("task", BUILD)
def test_figures_show_ground_truth_and_prediction(synthetic, tmp_path, task):
    data = DATA[task](str(synthetic), batch_size=3, num_workers=0)
    task = BUILD[task]().eval()
    data.setup("validate")
    task.set_meta(data.meta)
    batch = next(iter(data.val_dataloader()))
    figure = task.plot(batch, task.infer(task.normalized(batch)))
    figure.savefig(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert np.asarray(image).std() > 10
    titles = [axis.get_title() for axis in figure.axes]
    assert any("true" in title or "ground truth" in title for title in titles)


def test_an_interrupted_epoch_leaves_nothing_in_the_metrics(synthetic, tmp_path):
    class InterruptedEpochError(Exception):
        pass

    class Breaking(Callback):
        def on_test_batch_end(self, *arguments):
            raise InterruptedEpochError

        on_validation_batch_end = on_test_batch_end

    task = segmentation()
    data = VOCSegmentationDataModule(str(synthetic), batch_size=2, num_workers=0)
    whole = {"limit_val_batches": 1.0}
    for run in ("test", "validate"):
        want = getattr(trainer(tmp_path, **whole), run)(task, data, verbose=False)
        tested = getattr(task, "tested_images", None)
        with pytest.raises(InterruptedEpochError):
            getattr(trainer(tmp_path, callbacks=[Breaking()], **whole), run)(task, data, verbose=False)
        (again,) = getattr(trainer(tmp_path, **whole), run)(task, data, verbose=False)
        assert again == pytest.approx(want[0], nan_ok=True)
        assert getattr(task, "tested_images", None) == tested


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*You defined a `validation_step`.*")
def test_a_loss_that_is_not_finite_in_half_precision_names_the_precisions_that_work(tmp_path):
    task = classification(num_classes=3, optimizer=functools.partial(torch.optim.AdamW, lr=0.1))
    row = {"image": torch.randint(256, (3, 32, 32), dtype=torch.uint8), "label": 1}
    loader = torch.utils.data.DataLoader([row] * 8, batch_size=4)
    with pytest.raises(DataError, match=r"not finite at step [12](.|\n)*use 16-mixed or bf16-true"):
        trainer(tmp_path, precision="16-true", max_steps=4, max_epochs=4).fit(task, loader)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*You defined a `validation_step`.*")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("broken", [1, 3])
def test_a_loss_that_is_not_finite_is_named_with_its_step_also_when_it_is_read_late(
    tmp_path, monkeypatch, late, broken
):
    class Diverging(ClassificationTask):
        def training_loss(self, batch):
            parts = super().training_loss(batch)
            return {key: part * (float("inf") if self.global_step == broken else 1) for key, part in parts.items()}

    monkeypatch.setattr(Diverging, "_reads_late", late)
    task = Diverging(SMALL, 3, optimizer=SGD)
    rows = [
        {"image": torch.randint(256, (3, 32, 32), dtype=torch.uint8), "label": 1, "name": str(n)} for n in range(16)
    ]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    images = ", ".join(str(4 * broken + place) for place in range(3))
    with pytest.raises(DataError, match=rf"not finite at step {broken} .*inf.* on {images}, …"):
        trainer(tmp_path, max_steps=4, max_epochs=1).fit(task, loader)
    assert task.global_step == broken + late


def test_thresholds_of_the_detector_do_not_change_the_network():
    effects = effects_of(DetectionTask)
    for key, effect in (
        ("rpn_nms_thresh", Effect.RESULT),
        ("box_batch_size_per_image", Effect.RESULT),
        ("box_score_thresh", Effect.RESULT),
        ("bbox_reg_weights", Effect.NETWORK),
    ):
        assert declared_effect(effects, ["detector", key]) is effect


def test_the_detector_says_the_size_of_its_largest_images():
    assert detection(min_size=50, max_size=64).image_size == (64, 64)


@pytest.mark.parametrize("size", [(200, 150), (64, 300), (70, 10), (40, 64), (129, 65)])
def test_tiles_cover_a_large_image(monkeypatch, size):
    monkeypatch.setattr(segmentation_module, "_TILED", 0)
    monkeypatch.setattr(segmentation_module, "_TILE", 64)
    monkeypatch.setattr(segmentation_module, "_MARGIN", 16)
    task = SegmentationTask("sis_demo", 200)
    image = torch.randint(200, (3, *size)).float()
    tiles = []

    def first_channel(tile: torch.Tensor) -> torch.Tensor:
        tiles.append(tuple(tile.shape[1:]))
        return tile[0].to(torch.uint8)

    monkeypatch.setattr(task, "_whole", first_channel)
    (output,) = task.infer({"image": image[None]})
    assert torch.equal(output["mask"], image[0].to(torch.uint8))
    assert set(tiles) == {(min(64, size[0]), min(64, size[1]))}


def test_pixels_inside_of_tiles_are_those_of_the_whole_image(monkeypatch):
    torch.manual_seed(0)
    task = SegmentationTask("sis_demo", 5, architecture="fpn", output_stride=32).eval()
    image = torch.randint(256, (3, 96, 256), dtype=torch.uint8)
    with torch.no_grad():
        whole = task.infer(task.normalized({"image": image[None]}))[0]["mask"]
        monkeypatch.setattr(segmentation_module, "_TILED", 0)
        assert torch.equal(task.infer(task.normalized({"image": image[None]}))[0]["mask"], whole)  # one tile
        monkeypatch.setattr(segmentation_module, "_TILE", 192)
        monkeypatch.setattr(segmentation_module, "_MARGIN", 64)
        tiled = task.infer(task.normalized({"image": image[None]}))[0]["mask"]
    assert len(whole.unique()) > 1
    assert (tiled == whole).double().mean() > 0.9


def test_metrics_on_an_image_for_which_memory_does_not_suffice(monkeypatch):
    monkeypatch.setattr(segmentation_module, "_TILED", 0)
    monkeypatch.setattr(segmentation_module, "free_memory", lambda device: 10**7)
    task = SegmentationTask("sis_demo", 3).eval()
    image = torch.zeros(1, 3, 640, 480)
    batch = {"image": image, "mask": torch.zeros(1, 640, 480, dtype=torch.uint8), "name": ["a.jpg"]}
    with torch.no_grad(), pytest.raises(DataError, match=r"a.jpg: 480×640 px need some .* GB are free"):
        task.evaluate(batch, task.test_metrics)
    monkeypatch.setattr(segmentation_module, "free_memory", lambda device: None)  # nobody knows
    with torch.no_grad():
        task.evaluate(batch, task.test_metrics)
    assert task.test_metrics.compute()


def test_a_mask_is_drawn_in_strips(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(4, (50, 30), dtype=torch.uint8, generator=generator)
    image = torch.randint(256, (3, 50, 30), dtype=torch.uint8, generator=generator)
    prediction = predictions.SegmentationPrediction(image, "a", mask, ("background", "b", "c", "d"))
    whole = prediction.overlay()
    monkeypatch.setattr(predictions, "_STRIP", 100)
    assert torch.equal(prediction.overlay(), whole)
    assert torch.equal(whole[:, mask == 0], image[:, mask == 0])
    assert not torch.equal(whole, image)
    assert sum(prediction.shares.values()) == pytest.approx(1)
    assert prediction.shares["b"] == pytest.approx((mask == 1).double().mean().item())
