"""The library as a user writes it in Python: no command line, no configuration, little code."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import sis_lightning
from sis_lightning import (
    ClassificationTask,
    COCOEvaluator,
    DetectionTask,
    IoUEvaluator,
    KeypointTask,
    SegmentationTask,
    TopKEvaluator,
    VOCEvaluator,
    collate,
)
from sis_lightning.backbones import backbone_config
from sis_lightning.errors import DataError, UsageError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*You defined a `validation_step`.*",
    "ignore:.*You passed in a `val_dataloader`.*",
)

SMALL = backbone_config("sis_demo", channels=8, width=4)
IMAGE = torch.randint(256, (3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def classification(**options) -> ClassificationTask:
    return ClassificationTask(**{"backbone": SMALL, "num_classes": 7, **options})


def segmentation(**options) -> SegmentationTask:
    decoder = {"decoder_channels": 16, "decoder_atrous_rates": [1, 2, 3]}
    return SegmentationTask(**{"backbone": SMALL, "num_classes": 5, "decoder": decoder, **options})


def detection(**options) -> DetectionTask:
    sizes = {"min_size": 64, "max_size": 64, "fpn_channels": 8, "head_channels": 8}
    return DetectionTask(**{"backbone": SMALL, "num_classes": 4, **sizes, **options})


def keypoints(**options) -> KeypointTask:
    return KeypointTask(**{"backbone": SMALL, "deconv_channels": (8, 8, 8), **options})


BUILD = {"cls": classification, "seg": segmentation, "det": detection, "kpt": keypoints}


def sample(kind: str, index: int, channels: int = 3) -> dict:
    generator = torch.Generator().manual_seed(index)
    image = torch.randint(256, (channels, 64, 64), dtype=torch.uint8, generator=generator)
    targets = {
        "cls": {"label": index % 7},
        "seg": {"mask": torch.randint(5, (64, 64), dtype=torch.uint8, generator=generator)},
        "det": {"boxes": torch.tensor([[4.0, 5, 40, 44], [20, 20, 60, 60]])[: index % 3], "labels": torch.ones(2)},
        "kpt": {"keypoints": torch.cat([64 * torch.rand(17, 2, generator=generator), torch.ones(17, 1)], dim=1)},
    }[kind]
    if kind == "det":
        targets["labels"] = torch.tensor([1, 4])[: index % 3]
    return {"image": image, **targets}


def loader(kind: str, channels: int = 3, count: int = 8) -> DataLoader:
    samples = [sample(kind, index, channels) for index in range(count)]
    if kind != "det":
        return DataLoader(samples, batch_size=4)
    return DataLoader(
        samples, batch_size=4, collate_fn=lambda rows: {key: [row[key] for row in rows] for key in rows[0]}
    )


def trainer(tmp_path, **options) -> lightning.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    usual = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path}
    return lightning.Trainer(**{**usual, **quiet, **options})


# Tasks alone.


@pytest.mark.parametrize("kind", BUILD)
def test_any_trainer_and_loader_fit_and_the_checkpoint_predicts(tmp_path, kind):
    task, run = BUILD[kind](), trainer(tmp_path)
    run.fit(task, loader(kind), loader(kind))
    (metrics,) = run.test(task, loader(kind), verbose=False)
    assert task.monitor.replace("val/", "test/") in metrics
    (first, _) = run.predict(task, loader(kind))
    assert len(first) == 4
    run.save_checkpoint(tmp_path / "task.ckpt")
    content = torch.load(tmp_path / "task.ckpt", weights_only=True)
    assert (
        content["task_class"] == f"sis_lightning.tasks.{type(task).__module__.rpartition('.')[2]}.{type(task).__name__}"
    )
    for again in (type(task).load_from_checkpoint(tmp_path / "task.ckpt"), sis_lightning.load(tmp_path / "task.ckpt")):
        assert type(again) is type(task)
        assert all(
            torch.equal(a, b) for a, b in zip(task.state_dict().values(), again.state_dict().values(), strict=True)
        )
    assert not again.training
    prediction = again.predict(IMAGE)
    assert prediction.image.shape == (3, 40, 56)
    assert repr(prediction).startswith(f"<{type(task).__name__.removesuffix('Task')}Prediction")


def test_a_segmentation_with_other_channels_and_a_frozen_backbone(tmp_path):
    task = SegmentationTask(
        backbone="sis50", operator="interactive1", num_classes=12, freeze_backbone=True, in_channels=4
    )
    assert task.backbone.config.operator == "interactive1"
    before = {key: value.clone() for key, value in task.backbone.state_dict().items()}
    run = trainer(tmp_path, max_steps=1)
    run.fit(task, loader("seg", channels=4), loader("seg", channels=4, count=2))
    assert all(torch.equal(value, before[key]) for key, value in task.backbone.state_dict().items())
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert not optimized & {id(parameter) for parameter in task.backbone.parameters()}
    run.test(task, loader("seg", channels=4, count=2), verbose=False)
    assert task.predict(torch.zeros(4, 40, 40, dtype=torch.uint8)).mask.shape == (40, 40)
    with pytest.raises(DataError, match="an image of 3 channels, not 4"):
        task.predict(Image.new("RGB", (9, 9)))


def test_backbones_are_named_mapped_or_configured():
    mapping = {"family": "resnet", "depth": 14, "width": 4, "channels": 8}
    names = {ClassificationTask(b, 3).backbone_config.slug for b in (mapping, sis_lightning.BackboneConfig(**mapping))}
    assert names == {"resnet14-4w-conv-8ch"}
    assert ClassificationTask("sis_demo", 3).backbone_config == backbone_config("sis_demo")


def test_the_optimizer_has_a_default_and_takes_functions_and_plain_data(tmp_path):
    spec = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002}}
    for given, kind, rate in (
        (None, "SGD", 0.01),
        (spec, "AdamW", 0.002),
        (lambda p: torch.optim.Adam(p, 0.5), "Adam", 0.5),
    ):
        run = trainer(tmp_path, max_steps=1)
        run.fit(classification(optimizer=given), loader("cls"))
        assert (type(run.optimizers[0]).__name__, run.optimizers[0].param_groups[0]["lr"]) == (kind, rate)
    for wrong, words in (
        ({"class_path": "torch.optim.Adamm"}, "no class 'torch.optim.Adamm'"),
        (3, "must be a function"),
    ):
        with pytest.raises(UsageError, match=words):
            classification(optimizer=wrong)


def test_class_weights_weigh_the_loss():
    batch = {"image": torch.randn(4, 3, 32, 32), "label": torch.tensor([0, 1, 2, 3])}
    weights = [1.0, 2, 3, 4, 0, 0, 0]
    torch.manual_seed(0)
    task = classification(class_weights=weights).eval()
    want = nn.functional.cross_entropy(task(batch["image"]), batch["label"], torch.tensor(weights))
    torch.testing.assert_close(task.training_loss(batch)["cross_entropy"], want)
    pixels = {"image": torch.randn(2, 3, 32, 32), "mask": torch.randint(5, (2, 32, 32), dtype=torch.uint8)}
    task = segmentation(class_weights=[1, 2, 3, 4, 5]).eval()
    want = nn.functional.cross_entropy(task(pixels["image"]), pixels["mask"].long(), torch.arange(1.0, 6))
    torch.testing.assert_close(task.training_loss(pixels)["cross_entropy"], want)
    for wrong in ([1.0], [-1.0] * 7, [float("nan")] * 7):
        with pytest.raises(UsageError, match="class_weights"):
            classification(class_weights=wrong)
    with pytest.raises(UsageError, match="give one of them"):
        segmentation(class_weights=[1] * 5, background_weight=0.5)


def test_a_trained_task_starts_one_with_other_classes(tmp_path):
    trained = segmentation(meta={"class_names": ["sky", "sea", "sand", "salt", "sun"]})
    run = trainer(tmp_path, max_steps=1)
    run.fit(trained, loader("seg"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert sis_lightning.load(tmp_path / "run").class_names == ("sky", "sea", "sand", "salt", "sun")
    for task in (
        sis_lightning.load(tmp_path / "run", num_classes=3),
        segmentation(num_classes=3, weights=str(tmp_path / "run")),
    ):
        want = trained.model.state_dict()
        for key, value in task.model.state_dict().items():
            head = key.startswith("segmentation_head")
            assert value.shape != want[key].shape if head else torch.equal(value, want[key]), key
        assert task.class_names == ("0", "1", "2")
    body = classification(backbone_weights=str(tmp_path / "run"))
    assert torch.equal(body.backbone.stem.conv.weight, trained.backbone.stem.conv.weight)
    with pytest.raises(DataError, match="does not fit"):
        segmentation(weights=str(tmp_path / "run"), backbone=backbone_config(SMALL, operator="recurrent1"))


def test_batches_of_another_format_say_what_is_wanted(tmp_path):
    wrong = DataLoader([(torch.zeros(3, 8, 8, dtype=torch.uint8), 1)] * 4, batch_size=2)
    with pytest.raises(
        UsageError, match="the batch is a list, but ClassificationTask needs a mapping with 'image' and 'label'"
    ):
        trainer(tmp_path).fit(classification(), wrong)
    with pytest.raises(UsageError, match=r"has 'image', 'label', but SegmentationTask needs .* 'mask'"):
        trainer(tmp_path).fit(segmentation(), loader("cls"))


# Prediction.


def test_predict_takes_paths_folders_images_and_tensors(tmp_path):
    torch.manual_seed(0)
    task = segmentation().train()
    array = IMAGE.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "a.png")
    (tmp_path / "deep").mkdir()
    Image.fromarray(array).save(tmp_path / "deep" / "b.png")
    want = task.predict(IMAGE).mask
    assert task.training
    assert torch.equal(task.predict(str(tmp_path / "a.png")).mask, want)
    assert torch.equal(task.predict(Image.fromarray(array)).mask, want)
    several = task.predict([tmp_path / "a.png", IMAGE, Image.fromarray(array)], batch_size=2)
    assert [p.name for p in several] == ["a.png", "1", "2"]
    assert all(torch.equal(p.mask, want) for p in several)
    assert [p.name for p in task.predict(tmp_path)] == ["a.png", "deep/b.png"]
    assert len(task.predict(torch.stack([IMAGE, IMAGE]))) == 2
    assert task.predict([]) == []


def test_files_are_rotated_by_exif(tmp_path):
    image = Image.fromarray(IMAGE.permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "rotated.png", exif=exif)
    assert segmentation().predict(tmp_path / "rotated.png").mask.shape == (56, 40)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ("gone.jpg", DataError, "no such image"),
        (3, UsageError, "images is a int"),
        (IMAGE.float(), UsageError, r"float32 \(3, 40, 56\), must be uint8 \(3, H, W\)"),
        (IMAGE[:1], UsageError, r"must be uint8 \(3, H, W\)"),
        ([None], UsageError, "an image is a NoneType"),
    ],
)
def test_predict_refuses_what_is_no_image(wrong, error, words):
    with pytest.raises(error, match=words):
        classification().predict(wrong)


def test_predictions_are_typed_and_save_themselves(tmp_path, capsys):
    one = classification(meta={"class_names": list("abcdefg")}).predict(IMAGE)
    assert one.class_name == one.top5[0][0]
    assert one.probability == pytest.approx(max(one.probabilities.tolist()))
    assert len(one.top5) == 5
    two = segmentation().predict(IMAGE)
    assert sum(two.shares.values()) == pytest.approx(1)
    three = detection(shown_score=0.0, detector={"box_score_thresh": 0.0}).predict(IMAGE)
    assert len(three.boxes) == len(three.scores) == len(three.labels) == len(three.class_names) > 0
    assert set(three.class_names) <= {"1", "2", "3", "4"}
    assert len(three.above(float(three.scores[0])).boxes) >= 1
    four = keypoints(shown_score=0.0).predict(IMAGE, boxes=[[2, 3, 30, 38], [10, 3, 40, 38]])
    assert four.keypoints.shape[1:] == (17, 3)
    assert len(four.boxes) == len(four.scores) == len(four.keypoints)
    for number, prediction in enumerate((one, two, three, four)):
        path = prediction.save(tmp_path / "new" / f"{number}.png")
        with Image.open(path) as image:
            assert np.asarray(image).std() > 0
        assert prediction._repr_png_().startswith(b"\x89PNG")
        prediction.show()
        assert prediction.describe() in capsys.readouterr().out
        row = prediction.write(tmp_path / "rows")
        assert row["name"] == "0"
        with pytest.raises(UsageError, match="image format"):
            prediction.save(tmp_path / "x.what")


def test_person_boxes_are_those_that_were_given():
    task = keypoints(shown_score=0.0, flip_test=False)
    found = task.predict([IMAGE, IMAGE], boxes=[torch.tensor([[2.0, 3, 26, 35]]), np.zeros((0, 4))])
    torch.testing.assert_close(found[0].boxes, torch.tensor([[2.0, 3, 26, 35]], dtype=torch.float64))
    assert len(found[1].boxes) == 0
    assert len(task.predict(IMAGE).boxes) == 1
    with pytest.raises(UsageError, match="boxes has 1 entries, but there are 2 images"):
        task.predict([IMAGE, IMAGE], boxes=[[[0, 0, 5, 5]]])


def test_person_boxes_keep_their_proportions():
    found = keypoints(shown_score=0.0, flip_test=False).predict(IMAGE, boxes=[[2, 3, 50, 20]])
    torch.testing.assert_close(found.boxes, torch.tensor([[2.0, 3, 50, 20]], dtype=torch.float64))


# Loading.


def saved(path, task, loaders) -> str:
    run = trainer(path, max_steps=1)
    run.fit(task, loaders)
    run.save_checkpoint(path / "task.ckpt")
    return str(path / "task.ckpt")


NAMES = ["ape", "bee", "cat", "dog", "eel", "fox", "gnu"]


class Named(lightning.LightningDataModule):
    """Hands names of classes to the task, as a DataModule of the package does."""

    def __init__(self, kind="cls", **meta):
        super().__init__()
        self.kind, self.meta = kind, meta

    def setup(self, stage=None):
        self.trainer.lightning_module.set_meta(self.meta)

    def train_dataloader(self):
        return loader(self.kind)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def test_data_with_other_names_than_the_checkpoint_is_refused(tmp_path):
    file = saved(tmp_path, classification(meta={"class_names": NAMES}), loader("cls"))
    swapped = Named(class_names=["bee", "ape", *NAMES[2:]])
    words = "class 0 is 'bee' in the data, but 'ape' in the checkpoint"
    with pytest.raises(UsageError, match=words):
        trainer(tmp_path).test(classification(), datamodule=swapped, ckpt_path=file, weights_only=True)
    with pytest.raises(UsageError, match=words):
        trainer(tmp_path, max_epochs=2).fit(classification(), datamodule=swapped, ckpt_path=file, weights_only=True)
    with pytest.raises(UsageError, match=words):
        trainer(tmp_path).test(sis_lightning.load(file), datamodule=swapped)
    trainer(tmp_path).test(sis_lightning.load(file), datamodule=Named(class_names=NAMES), verbose=False)
    trainer(tmp_path).test(sis_lightning.load(file), loader("cls"), verbose=False)
    # Training on other classes that happen to be as many.
    for task in (sis_lightning.load(file, num_classes=7), classification(weights=file)):
        trainer(tmp_path, max_steps=1).fit(task, datamodule=swapped)
        assert task.class_names[0] == "bee"


def test_classes_that_are_called_by_numbers_are_names_too(tmp_path):
    digits = list("0123456")
    file = saved(tmp_path, classification(meta={"class_names": digits}), loader("cls"))
    with pytest.raises(UsageError, match="class 0 is '6' in the data, but '0' in the checkpoint"):
        trainer(tmp_path).test(
            classification(), datamodule=Named(class_names=digits[::-1]), ckpt_path=file, weights_only=True
        )
    # Weights of a task that knew no names fit any.
    unnamed = saved(tmp_path, classification(), loader("cls"))
    task = sis_lightning.load(unnamed)
    trainer(tmp_path).test(task, datamodule=Named(class_names=NAMES), verbose=False)
    assert task.class_names == tuple(NAMES)


def test_keypoints_of_another_order_are_refused(tmp_path):
    points = {"keypoint_names": [*"abcdefghijklmnopq"], "flip_pairs": [[0, 1]]}
    file = saved(tmp_path, keypoints(meta=points), loader("kpt"))
    for changed, words in (
        ({"keypoint_names": [*"abcdefghijklmnoqp"]}, "keypoint 15 is 'q' in the data, but 'p' in the checkpoint"),
        ({"flip_pairs": [[0, 2]]}, "a flip exchanges the keypoints 'a' and 'b' only in the checkpoint"),
    ):
        data = Named("kpt", class_names=["person"], **{**points, **changed})
        with pytest.raises(UsageError, match=words):
            trainer(tmp_path).test(keypoints(), datamodule=data, ckpt_path=file, weights_only=True)


def test_a_trained_task_takes_other_channels_and_keypoints(tmp_path):
    file = saved(tmp_path, segmentation(meta={"class_names": NAMES[:5], "mean": [0.1] * 3}), loader("seg"))
    task = sis_lightning.load(file, in_channels=4)
    assert (task.in_channels, len(task.meta.mean), task.class_names) == (4, 4, tuple(NAMES[:5]))
    assert task.predict(torch.zeros(4, 32, 32, dtype=torch.uint8)).mask.shape == (32, 32)
    file = saved(tmp_path, keypoints(), loader("kpt"))
    other = sis_lightning.load(file, num_keypoints=3)
    assert other.meta.keypoint_names == ("0", "1", "2")
    assert other.predict(IMAGE).keypoints.shape[1:] == (3, 3)


def test_arguments_that_load_refuses(tmp_path):
    file = saved(tmp_path, segmentation(), loader("seg"))
    for options, words in (
        ({"weights": file}, "load takes no weights"),
        ({"backbone_weights": "timm:x"}, "load takes no backbone_weights"),
        ({"which": "beste"}, "which is 'beste', must be 'last' or 'best'"),
        ({"num_clases": 3}, "unexpected keyword argument 'num_clases'"),
    ):
        with pytest.raises(UsageError, match=words):
            sis_lightning.load(file, **options)
    with pytest.raises(DataError, match="which a trained network cannot exchange") as failure:
        sis_lightning.load(file, operator="recurrent1")
    assert "load_backbone_weights(task.backbone, path, strict=False)" in str(failure.value)


# Batches of one's own loader.


@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        ("cls", {"label": torch.tensor([0, 1, 7, 2])}, r"a label of the batch is 7, must be in 0…6"),
        ("cls", {"label": torch.zeros(4, 7)}, r"label is \(4, 7\), must be a tensor \(4,\)"),
        ("cls", {"image": torch.zeros(4, 4, 64, 64, dtype=torch.uint8)}, "but the network takes 3 channels"),
        ("seg", {"mask": torch.full((4, 64, 64), 5, dtype=torch.uint8)}, r"label of the batch is 5, must be in 0…4"),
        ("seg", {"mask": torch.zeros(4, 32, 64, dtype=torch.uint8)}, r"must be a tensor \(4, 64, 64\)"),
        ("seg", {"image": [torch.zeros(3, 64, 64, dtype=torch.uint8)] * 4}, "but they are a list"),
        ("det", {"labels": [torch.tensor([0, 1]), *[torch.zeros(0).long()] * 3]}, "is 0, must be in 1…4"),
        ("det", {"labels": [torch.tensor([1])] * 4}, r"boxes \(2, 4\) and labels \(1,\) of an image"),
    ],
)
def test_targets_that_do_not_fit_are_named(tmp_path, kind, wrong, words):
    rows = [sample(kind, 2 if kind == "det" else index) for index in range(4)]
    if kind == "det":
        batch = {key: [row[key] for row in rows] for key in rows[0]}
        if len(wrong["labels"][1]) == 0:
            batch["boxes"] = [batch["boxes"][0], *[torch.zeros(0, 4)] * 3]
    else:
        batch = collate(rows)
    with pytest.raises(UsageError, match=words):
        trainer(tmp_path, max_steps=1).fit(BUILD[kind](), DataLoader([{**batch, **wrong}], batch_size=None))


def test_files_that_are_no_checkpoints(tmp_path):
    torch.save({"state_dict": {}, "global_step": 1}, tmp_path / "foreign.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "foreign.ckpt").read_bytes()[:100])
    torch.save({"state_dict": {}, "global_step": 1, "task_class": "nowhere.Task"}, tmp_path / "class.ckpt")
    torch.save({"state_dict": {}, "global_step": 1, "task_class": "torch.nn.Linear"}, tmp_path / "linear.ckpt")
    for name, words in {
        "foreign.ckpt": "does not say of which task",
        "list.ckpt": "not a checkpoint of sis-lightning",
        "torn.ckpt": "damaged, or not a checkpoint",
        "class.ckpt": "nowhere.Task, which cannot be imported",
        "linear.ckpt": "torch.nn.Linear is not a task",
        "foreing.ckpt": "no such checkpoint or run folder; did you mean 'foreign.ckpt'",
        "no/such": "the folder .* does not exist either",
        ".": "no checkpoint last.ckpt in this folder; it holds class.ckpt",
    }.items():
        with pytest.raises(DataError, match=words):
            sis_lightning.load(tmp_path / name)


# Parts alone.


def test_datasets_work_with_plain_pytorch(synthetic):
    for dataset in (
        sis_lightning.CIFAR100Dataset(synthetic, "test"),
        sis_lightning.VOCSegmentationDataset(synthetic, "val"),
        sis_lightning.VOCDetectionDataset(synthetic, ["2007/test"]),
        sis_lightning.COCODetectionDataset(synthetic, "val2017"),
        sis_lightning.COCOKeypointsDataset(synthetic, "val2017"),
    ):
        batch = next(iter(DataLoader(dataset, batch_size=2, collate_fn=collate)))
        assert batch["image"][0].dtype == torch.uint8
        assert dataset.meta.class_names


def test_datamodules_work_with_any_module(synthetic, tmp_path):
    class Mine(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = sis_lightning.Classifier(SMALL, 100)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.network(batch["image"] / 255), batch["label"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = sis_lightning.CIFAR100DataModule(str(synthetic), batch_size=4, num_workers=0)
    run = trainer(tmp_path, max_steps=2)
    run.fit(Mine(), datamodule=data)
    assert run.global_step == 2


def test_evaluators_work_alone():
    top = TopKEvaluator(3)
    top.update(torch.eye(3), torch.tensor([0, 1, 1]))
    assert float(top.compute()["top1"]) == pytest.approx(2 / 3)
    iou = IoUEvaluator(["background", "cat"])
    iou.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    assert float(iou.compute()["miou"]) == 1
    boxes = {"boxes": torch.tensor([[0.0, 0, 50, 50]]), "labels": torch.tensor([1])}
    for evaluator, key in ((COCOEvaluator("bbox", [7]), "AP"), (VOCEvaluator(["cat"]), "AP50_voc07")):
        evaluator.update([{**boxes, "scores": torch.tensor([0.9])}], [boxes])
        assert evaluator.compute()[key] == pytest.approx(1)


def test_evaluate_scores_files_and_content(synthetic):
    truth = synthetic / "coco" / "annotations" / "instances_val2017.json"
    data = sis_lightning.COCODetectionDataModule(str(synthetic), batch_size=4, num_workers=0)
    data.setup("validate")
    results = [
        {
            "image_id": image["image_id"],
            "category_id": data.meta.category_ids[label - 1],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": 0.9,
        }
        for batch in data.val_dataloader()
        for image in batch["truth"]
        for (x1, y1, x2, y2), label, ignored in zip(
            image["boxes"].tolist(), image["labels"].tolist(), image["ignored"].tolist(), strict=True
        )
        if not ignored
    ]
    evaluation = sis_lightning.evaluate(truth, results, "bbox")
    assert evaluation.metrics["AP50"] == pytest.approx(1)
    assert "AP50" in str(evaluation)


def test_backbones_and_operators():
    backbone = sis_lightning.create_backbone(SMALL, in_channels=1)
    assert set(backbone(torch.zeros(1, 1, 64, 64))) == {"c2", "c3", "c4", "c5"}
    assert "sis50" in sis_lightning.list_backbones()
    assert "interactive1" in sis_lightning.list_operators()
    assert sis_lightning.create_operator("basic", 8, 8)(torch.zeros(1, 8, 4, 4)).shape == (1, 8, 4, 4)


# Names and help.

PUBLIC = [name for name in dir(sis_lightning) if not name.startswith("_")]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_explains_itself(name):
    value = getattr(sis_lightning, name)
    text = inspect.getdoc(value)
    assert text
    first = text.split("\n\n")[0]
    assert re.match(r"[A-Z].{15,}\.$", " ".join(first.split())), first
    if inspect.isclass(value) and value.__init__ is not object.__init__ and not issubclass(value, Exception):
        own = [n for n in inspect.signature(value).parameters if n != "self"]
        documented = inspect.getdoc(value)
        missing = [n for n in own if f"\n    {n}: " not in documented and f" {n}: " not in documented]
        assert not missing, missing


def test_the_import_is_quick_and_without_torch():
    code = (
        "import sys, sis_lightning; assert not {'torch', 'numpy', 'lightning', 'PIL'} & set(sys.modules); "
        "assert 'load' in dir(sis_lightning)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        sis_lightning.lode  # noqa: B018 - the access raises


def test_loading_leaves_the_callers_random_numbers_as_they_were(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.fit(classification(), loader("cls"))
    run.save_checkpoint(tmp_path / "task.ckpt")
    before = torch.get_rng_state()
    sis_lightning.load(tmp_path / "task.ckpt")
    assert torch.equal(torch.get_rng_state(), before)
