"""What DataModules promise: to a task, to someone else's LightningModule, and to code without a Trainer."""

from __future__ import annotations

import functools
import inspect
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from sis_lightning import datamodules
from sis_lightning.datamodules import SISDataModule
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.errors import MissingDataError, UsageError
from sis_lightning.option_effects import effects_of

MODULES = [kind for name in datamodules.__all__ if name.endswith("DataModule") and (kind := getattr(datamodules, name))]
BUILD = {
    "cls": datamodules.CIFAR100DataModule,
    "seg": functools.partial(datamodules.VOCSegmentationDataModule, crop_size=32),
    "voc": datamodules.VOCDetectionDataModule,
    "coco": datamodules.COCODetectionDataModule,
    "kpt": functools.partial(datamodules.COCOKeypointsDataModule, input_size=(64, 32)),
}


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_every_argument_has_an_effect(kind):
    arguments = {
        name for cls in kind.__mro__ if issubclass(cls, SISDataModule) for name in inspect.signature(cls).parameters
    }
    arguments -= {"files", "loading"}
    assert effects_of(kind).keys() == arguments


class Foreign(LightningModule):
    """Someone else's module, which normalises nothing and knows nothing of us."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight * 1

    def validation_step(self, batch, batch_idx):
        self.seen.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Curious(Foreign):
    def set_meta(self, meta):
        self.meta = meta


def trainer(tmp_path) -> Trainer:
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    return Trainer(accelerator="cpu", max_steps=1, limit_val_batches=1, default_root_dir=tmp_path, **quiet)


@pytest.mark.parametrize("kind", BUILD)
def test_any_module_gets_uint8_images_and_the_meta_if_it_has_set_meta(synthetic, tmp_path, kind):
    for module in (Foreign(), Curious()):
        data = BUILD[kind](str(synthetic), batch_size=2, num_workers=0)
        trainer(tmp_path).fit(module, data)
        for batch in module.seen:
            images = batch["image"] if isinstance(batch["image"], list) else [batch["image"]]
            assert {image.dtype for image in images} == {torch.uint8}
    assert module.meta == data.meta
    assert DatasetMeta.from_dict(module.meta.to_dict()) == module.meta


@pytest.mark.parametrize("kind", BUILD)
def test_loaders_need_no_trainer(synthetic, kind):
    data = BUILD[kind](str(synthetic), batch_size=2, num_workers=0)
    with pytest.raises(UsageError, match=r"before setup\(\)"):
        data.meta  # noqa: B018
    data.setup()
    assert set(data.datasets) == {"train", "val", "test"}
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert len(next(iter(loader))["name"]) == 2
    assert data.meta.num_classes == data.num_classes > 0
    assert data.meta.primary_metric == ("AP50_voc07" if kind == "voc" else "")


@pytest.mark.parametrize("kind", BUILD)
def test_loader_workers_get_neither_trainer_nor_model(synthetic, tmp_path, kind):
    module = Foreign()
    module.large = torch.nn.Linear(1000, 1000)
    data = BUILD[kind](str(synthetic), batch_size=2, num_workers=0)
    trainer(tmp_path).fit(module, data)
    data.setup("test")
    assert data.trainer is not None
    for loader in (data.train_dataloader(), data.test_dataloader()):
        own = len(pickle.dumps(loader.dataset.dataset))  # the images of CIFAR are in memory
        assert len(pickle.dumps(loader.dataset)) - own < 5000


def test_workers_that_are_spawned_read_the_same(synthetic):
    def batches(workers: int) -> list:
        data = BUILD["kpt"](str(synthetic), batch_size=4, num_workers=workers)
        data.setup("fit")
        loader = data.train_dataloader()
        if workers:
            loader.multiprocessing_context = "spawn"
        return list(loader)

    for here, there in zip(batches(0), batches(1), strict=True):
        assert here["name"] == there["name"]
        assert torch.equal(here["image"], there["image"])


def test_every_training_sample_is_flipped_with_probability_one_half(synthetic):
    data = BUILD["coco"](str(synthetic), batch_size=2, num_workers=0)
    data.setup("fit")
    sample = data.datasets["train"][0]
    torch.manual_seed(0)
    flipped = [not torch.equal(data.train_transform(sample)["image"], sample["image"]) for _ in range(40)]
    assert 8 < sum(flipped) < 32


def test_image_sizes():
    sizes = {kind: build("root").image_size for kind, build in BUILD.items()}
    assert sizes == {"cls": (32, 32), "seg": (32, 32), "voc": None, "coco": None, "kpt": (64, 32)}
    assert datamodules.ImageFolderDataModule("root", 48).image_size == (48, 48)


def test_a_mistyped_root_is_an_error_not_new_data(tmp_path):
    synthetic = {"root": str(tmp_path / "made"), "images": 20, "size": 48, "min_object": 12, "kinds": ["voc"]}
    data = datamodules.VOCSegmentationDataModule(str(tmp_path / "mode"), synthetic=synthetic)
    assert not data.to_be_made
    data.prepare_data()
    with pytest.raises(MissingDataError, match=r"mode' does not exist"):
        data.setup("fit")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="synthetic has no 'root'"):
        datamodules.VOCSegmentationDataModule("root", synthetic={"images": 20})


def test_a_folder_to_predict_on_has_no_meta(synthetic, tmp_path):
    folder = synthetic / "coco" / "val2017"
    data = datamodules.CIFAR100DataModule(str(tmp_path / "nowhere"), predict_path=str(folder), num_workers=0)
    data.setup("predict")
    assert next(iter(data.predict_dataloader()))["image"].shape[1:] == (3, 32, 32)
    with pytest.raises(UsageError, match="labelled"):
        data.meta  # noqa: B018
