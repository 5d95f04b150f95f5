"""DataModules: what they read equals the files, and augmentation depends only on seed, epoch and index."""

from __future__ import annotations

import pickle
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from sis_lightning.datamodules import CIFAR100DataModule, ImageFolderDataModule, VOCSegmentationDataModule
from sis_lightning.datamodules.base import _Augmented
from sis_lightning.datamodules.flips import RandomCropAndFlip
from sis_lightning.datamodules.samplers import BatchesBySize, EpochSampler, ShardSampler, sample_seed
from sis_lightning.datamodules.voc_segmentation import RandomScale
from sis_lightning.datasets.constants import voc_palette
from sis_lightning.datasets.folder import UnlabelledDataset
from sis_lightning.datasets.images import denormalize, normalize, read_image
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.datasets.voc import read_mask
from sis_lightning.errors import DataError, MissingDataError, UsageError
from sis_lightning.run.run import Run


@given(length=st.integers(0, 50), world=st.integers(1, 7))
def test_evaluation_yields_every_sample_once(length, world):
    ranks = [list(ShardSampler(length, rank, world)) for rank in range(world)]
    assert sorted(index for rank in ranks for _, index in rank) == list(range(length))
    assert [len(ShardSampler(length, rank, world)) for rank in range(world)] == [len(rank) for rank in ranks]


@given(length=st.integers(1, 50), world=st.integers(1, 7), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_training_yields_a_permutation_in_equal_shares(length, world, seed, epoch):
    ranks = []
    for rank in range(world):
        sampler = EpochSampler(length, seed, rank, world)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) == length // world
    dealt = [index for rank in ranks for _, index in rank]
    assert len(set(dealt)) == len(dealt) == length // world * world
    assert {e for rank in ranks for e, _ in rank} <= {epoch}


def test_epochs_and_seeds_differ():
    def order(seed, epoch):
        sampler = EpochSampler(40, seed)
        sampler.set_epoch(epoch)
        return [index for _, index in sampler]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def batches(root, workers: int, epoch: int) -> torch.Tensor:
    data = VOCSegmentationDataModule(str(root), crop_size=32, batch_size=4, num_workers=workers)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return torch.cat([batch["image"] for batch in loader])


def test_augmentation_depends_only_on_epoch_and_index(synthetic):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = batches(synthetic, 0, epoch=3)
    assert torch.equal(torch.get_rng_state(), before)  # the model's own randomness is not disturbed
    torch.manual_seed(6)
    assert torch.equal(batches(synthetic, 2, epoch=3), first)
    assert not torch.equal(batches(synthetic, 0, epoch=4), first)


@pytest.mark.parametrize(
    ("size", "padding", "colour"), [(32, 4, (124, 116, 104)), (9, 1, (0, 0, 0)), (8, 1, (1, 2, 3))]
)
def test_own_crop_and_flip_are_those_of_torchvision(size, padding, colour):
    theirs = v2.Compose([v2.RandomCrop(size, padding=padding, fill=list(colour)), v2.RandomHorizontalFlip()])
    ours = RandomCropAndFlip(size, padding, colour)
    image = tv_tensors.Image(torch.randint(0, 256, (3, size, size), dtype=torch.uint8))
    for seed in range(40):
        torch.manual_seed(seed)
        wanted, left = theirs(image), torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(ours(image), wanted)
        assert torch.equal(torch.get_rng_state(), left)


def test_the_padding_of_the_cifar_recipe_is_0_when_it_is_normalised(synthetic):
    """ResNeXt's code normalises first, and then pads with zeros: the mean colour, here up to half of 1/255."""
    root = f"--data.root={synthetic}"
    data = Run.from_arguments(["--config=tasks/cls_cifar100.yaml", root, "--data.num_workers=0"]).datamodule
    data.setup("fit")
    white = tv_tensors.Image(torch.full((3, 32, 32), 255, dtype=torch.uint8))
    crops = torch.stack([data.train_transform({"image": white})["image"] for _ in range(20)])
    outside = crops.permute(1, 0, 2, 3)[:, crops[:, 0] < 255]
    assert outside.numel()
    normalised = normalize(outside[:, None], data.meta.mean, data.meta.std)
    assert data.meta.mean == (0.485, 0.456, 0.406)
    assert normalised.abs().max() <= 0.5 / 255 / 0.224


def test_samples_of_a_batch_are_seeded_one_by_one():
    """Each sample as if it were alone, and every generator of the process afterwards as before."""

    def drawn(sample: int) -> tuple[float, float, float, int]:
        return (torch.rand(1).item(), float(np.random.rand()), random.random(), sample)

    augmented = _Augmented(range(100, 200), drawn, 7)  # type: ignore[arg-type]
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    loaded = augmented.__getitems__([(4, index) for index in range(5)])
    after = drawn(0)
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    assert after == drawn(0)
    for index, sample in enumerate(loaded):
        seed = sample_seed(7, 4, index)
        torch.manual_seed(seed), np.random.seed(seed % 2**32), random.seed(seed)
        assert sample == drawn(100 + index) == augmented[4, index]


def test_denormalize_inverts_normalize():
    mean, std = DatasetMeta().mean, DatasetMeta().std
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    normal = normalize(images, mean, std)
    want = (images.numpy() / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    np.testing.assert_allclose(normal.numpy(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(denormalize(normal, mean, std), images / 255, rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(5, 40), width=st.integers(5, 40), seed=st.integers(0, 99))
def test_random_scale_keeps_image_and_mask_together(height, width, seed):
    from torchvision import tv_tensors

    torch.manual_seed(seed)
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[: height // 2] = 9
    image = tv_tensors.Image((mask * 20).expand(3, -1, -1).contiguous())
    scaled, ids = RandomScale((0.5, 2.0))(image, tv_tensors.Mask(mask))
    assert scaled.shape[1:] == ids.shape
    assert 0.5 * height - 1 <= ids.shape[0] <= 2 * height + 1
    assert set(ids.unique().tolist()) <= {0, 9}
    assert abs((scaled[0] > 90).float().mean() - (ids == 9).float().mean()) < 0.5 / ids.shape[0] + 0.02


# CIFAR-100


def test_cifar_reads_the_python_layout(synthetic):
    data = CIFAR100DataModule(str(synthetic), batch_size=8, num_workers=0)
    data.setup("fit")
    with (synthetic / "cifar-100-python" / "train").open("rb") as file:
        raw = pickle.load(file, encoding="bytes")
    source = data.datasets["train"]
    assert len(source) == len(raw[b"fine_labels"])
    for index in (0, len(source) - 1):
        assert source[index]["label"] == raw[b"fine_labels"][index]
        assert np.array_equal(source[index]["image"].numpy().reshape(-1), raw[b"data"][index])
    assert data.num_classes == 100
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8
    assert batch["label"].dtype == torch.int64
    assert data.identity().startswith("synthetic")


def test_cifar_with_another_checksum_is_other(synthetic, tmp_path):
    shutil.copytree(synthetic / "cifar-100-python", tmp_path / "cifar-100-python")
    (tmp_path / "cifar-100-python" / "SYNTHETIC.json").unlink()
    data = CIFAR100DataModule(str(tmp_path), num_workers=0)
    data.setup("test")
    assert data.identity().startswith("other")


def test_cifar_with_the_published_checksums_is_official(synthetic, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    from sis_lightning.datasets.download import md5

    folder = tmp_path / "cifar-100-python"
    shutil.copytree(synthetic / "cifar-100-python", folder)
    (folder / "SYNTHETIC.json").unlink()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "md5": md5(folder / "meta")})
    assert CIFAR100DataModule(str(tmp_path)).identity().startswith("official")
    with (folder / "test").open("ab") as file:
        file.write(b" ")
    assert CIFAR100DataModule(str(tmp_path)).identity().startswith("other")


class Attack:
    def __reduce__(self):
        return (print, ("this ran",))


def dump(content) -> bytes:
    return pickle.dumps(content, protocol=2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"nonsense", ["unreadable pickle"]),
        (dump({b"data": np.zeros((2, 3072), np.uint8)})[:-20], ["unreadable pickle"]),
        (dump({b"data": Attack()}), ["refused", "print"]),
        (dump([1, 2]), ["list"]),
        (dump({b"data": np.zeros((2, 3000), np.uint8), b"fine_labels": [1, 2]}), ["(2, 3000)", "3072"]),
        (dump({b"data": np.zeros((2, 3072), np.float32), b"fine_labels": [1, 2]}), ["float32", "uint8"]),
        (dump({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1]}), ["1 'fine_labels'", "2 images"]),
        (dump({b"data": np.zeros((2, 3072), np.uint8)}), ["no 'fine_labels'"]),
        (dump({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, 100]}), ["label 100", "100 classes"]),
    ],
)
def test_damaged_cifar_files_are_refused(synthetic, tmp_path, capfd, content, words):
    shutil.copytree(synthetic / "cifar-100-python", tmp_path / "cifar-100-python")
    (tmp_path / "cifar-100-python" / "train").write_bytes(content)
    with pytest.raises(DataError) as caught:
        CIFAR100DataModule(str(tmp_path)).setup("fit")
    assert all(word in str(caught.value) for word in words), caught.value
    assert "this ran" not in capfd.readouterr().out


# Folders of images


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, classes in {"train": ["ant", "bee", "cat"], "test": ["bee", "cat"]}.items():
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    tmp_path / split / name / f"{index}.png"
                )
    return tmp_path


def test_image_folder_numbers_classes_by_the_train_split(folder):
    data = ImageFolderDataModule(str(folder), image_size=32, crop="pad", batch_size=3, num_workers=0)
    data.setup("fit")
    assert list(data.class_names) == ["ant", "bee", "cat"]
    assert len(data.datasets["train"]) == 9
    # There is no val: test stands in, and its labels are those of train although it has no ant.
    samples = [data.datasets["val"][index] for index in range(6)]
    assert [sample["label"] for sample in samples] == [1, 1, 1, 2, 2, 2]
    assert samples[3]["name"] == "cat/0"
    with Image.open(folder / "test" / "cat" / "0.png") as image:
        assert np.array_equal(samples[3]["image"].permute(1, 2, 0).numpy(), np.array(image))


def test_resized_crops_give_one_size(folder):
    Image.new("L", (70, 50)).save(folder / "train" / "ant" / "grey.jpg")
    data = ImageFolderDataModule(str(folder), image_size=24, batch_size=10, num_workers=0)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["image"].shape == (10, 3, 24, 24)
    assert next(iter(data.val_dataloader()))["image"].shape[2:] == (24, 24)


def test_image_folder_errors(folder):
    Image.new("RGB", (48, 64)).save(folder / "train" / "ant" / "0.png")
    data = ImageFolderDataModule(str(folder), image_size=32, crop="pad", num_workers=0)
    data.setup("fit")
    with pytest.raises(DataError, match=r"0\.png: 48×64 px.*\n.*crop"):
        data.datasets["train"][0]
    (folder / "test" / "dog").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "test" / "dog" / "0.png")
    with pytest.raises(DataError, match="'dog' is not among the 3"):
        data.setup("test")
    (folder / "train" / "eel").mkdir()
    with pytest.raises(DataError, match="eel"):
        data.dataset("train")


def test_unreadable_images_are_refused(tmp_path):
    path = tmp_path / "a.jpg"
    with pytest.raises(DataError, match=r"a\.jpg: no such image"):
        read_image(path)
    Image.new("RGB", (64, 64), "red").save(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"a\.jpg: unreadable or truncated"):
        read_image(path)
    path.write_text("no image")
    with pytest.raises(DataError, match=r"a\.jpg: unreadable or truncated"):
        read_image(path)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=40),
    batch_size=st.integers(1, 8),
    max_pixels=st.integers(1, 9000),
    world=st.integers(1, 4),
)
def test_batches_to_predict_hold_every_image_once(sizes, batch_size, max_pixels, world):
    ranks = [list(BatchesBySize(sizes, batch_size, max_pixels, rank, world)) for rank in range(world)]
    assert sorted(index for batches in ranks for batch in batches for _, index in batch) == list(range(len(sizes)))
    assert all(ranks) == (len(sizes) >= world)
    for batch in (batch for batches in ranks for batch in batches):
        areas = [sizes[index][0] * sizes[index][1] for _, index in batch]
        assert len(batch) <= batch_size
        assert len(batch) == 1 or sum(areas) <= max_pixels
    tallest = max(height for height, _ in sizes)
    assert sizes[ranks[0][0][0][1]][0] == tallest


def test_images_of_one_size_are_predicted_together(tmp_path):
    for number, size in enumerate([(30, 20), (8, 8), (30, 20), (8, 8), (30, 20)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    data = VOCSegmentationDataModule(str(tmp_path), predict_path=str(tmp_path), batch_size=3, num_workers=0)
    data.setup("predict")
    batches = [(batch["image"].shape, batch["name"]) for batch in data.predict_dataloader()]
    assert batches == [((3, 3, 20, 30), ["0.png", "2.png", "4.png"]), ((2, 3, 8, 8), ["1.png", "3.png"])]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (5, 4)).save(path)
    image = read_image(path)
    assert image.shape == (3, 4, 5)
    assert image.dtype == torch.uint8


def test_folder_to_predict(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        UnlabelledDataset(tmp_path / "nothing")
    with pytest.raises(DataError, match="no images"):
        UnlabelledDataset(tmp_path)
    (tmp_path / "deep").mkdir()
    for path in ("b.PNG", "deep/a.jpg"):
        Image.new("RGB", (5, 4)).save(tmp_path / path)
    (tmp_path / "notes.txt").write_text("")
    source = UnlabelledDataset(tmp_path)
    assert [source[index]["name"] for index in range(len(source))] == ["b.PNG", "deep/a.jpg"]
    assert UnlabelledDataset(tmp_path / "b.PNG")[0]["name"] == "b.PNG"
    Image.new("RGB", (5, 4)).save(tmp_path / "b.jpg")
    names = UnlabelledDataset(tmp_path).names
    assert sorted(names) == ["b.PNG", "b.jpg", "deep/a.jpg"]


def test_an_image_of_absurd_size_is_refused_without_decoding_it(tmp_path, monkeypatch):
    Image.new("1", (400, 300)).save(tmp_path / "large.png")
    Image.new("1", (30, 40)).save(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    source = UnlabelledDataset(tmp_path, skip_bad=True)
    assert source.names == ["small.png"]
    assert source.bad == {"large.png": "0.12 megapixels, more than 0.1"}


def test_photographs_are_rotated_upright_and_16_bits_become_8(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (50, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert UnlabelledDataset(tmp_path)[0]["image"].shape == (3, 50, 30)
    assert read_image(tmp_path / "a.jpg").shape == (3, 30, 50)
    Image.fromarray(np.full((4, 4), 0x7F12, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").unique().tolist() == [0x7F]


def test_missing_synthetic_data_is_made(tmp_path, capsys):
    root = tmp_path / "made"
    arguments = {"root": str(root), "images": 20, "size": 48, "min_object": 12, "kinds": ["voc"]}
    data = VOCSegmentationDataModule(str(root), synthetic=arguments, num_workers=0)
    assert data.to_be_made
    data.prepare_data()
    data.setup("fit")
    assert "writing synthetic data" in capsys.readouterr().out
    assert data.identity().startswith("synthetic")
    assert not data.to_be_made
    data.prepare_data()
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match="nothing to download"):
        ImageFolderDataModule(str(tmp_path / "none")).fetch()


def test_fewer_images_than_devices(synthetic):
    data = VOCSegmentationDataModule(str(synthetic), num_workers=0)
    data.setup("test")
    data.trainer = SimpleNamespace(global_rank=0, world_size=99)
    with pytest.raises(UsageError, match=r"image\(s\) to test are fewer than 99, the number of devices"):
        data.test_dataloader()


# Pascal VOC


@pytest.fixture
def voc(synthetic, tmp_path):
    shutil.copytree(synthetic / "VOCdevkit", tmp_path / "VOCdevkit")
    return tmp_path / "VOCdevkit" / "VOC2012"


def names(voc, split: str) -> list[str]:
    return (voc / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()


def test_voc_reads_images_and_ids(synthetic):
    data = VOCSegmentationDataModule(str(synthetic), num_workers=0, batch_size=2)
    data.setup("test")
    home = synthetic / "VOCdevkit" / "VOC2012"
    assert data.home == home
    for sample in (data.datasets["test"][index] for index in range(3)):
        with Image.open(home / "SegmentationClass" / f"{sample['name']}.png") as mask:
            assert np.array_equal(sample["mask"].numpy(), np.array(mask))
        assert sample["image"].shape[1:] == sample["mask"].shape
    batch = next(iter(data.test_dataloader()))
    assert len(batch["name"]) == 2


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_is_found_from_any_of_its_folders(voc, below):
    data = VOCSegmentationDataModule(str(voc.parents[1] / below))
    data.setup("test")
    assert len(data.datasets["test"]) == len(names(voc, "val"))
    assert data.identity().startswith("synthetic")


def test_palette_is_the_devkits():
    def colour(label: int) -> list[int]:
        r = g = b = 0
        for j in range(8):
            r |= (label >> 0 & 1) << (7 - j)
            g |= (label >> 1 & 1) << (7 - j)
            b |= (label >> 2 & 1) << (7 - j)
            label >>= 3
        return [r, g, b]

    assert voc_palette() == [value for label in range(256) for value in colour(label)]


def test_train_aug_is_used_if_it_exists(voc):
    data = VOCSegmentationDataModule(str(voc))
    assert data.dataset("train").names == names(voc, "train")
    augmented = voc / "SegmentationClassAug"
    shutil.copytree(voc / "SegmentationClass", augmented)
    assert data.dataset("train").names == sorted(set(names(voc, "trainval")) - set(names(voc, "val")))
    (voc / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("\n".join(names(voc, "train")[:3]))
    source = data.dataset("train")
    assert source.names == names(voc, "train")[:3]
    assert source.masks[0].parent == augmented
    assert VOCSegmentationDataModule(str(voc), train_split="train").dataset("train").masks[0].parent != augmented
    assert data.dataset("val").masks[0].parent == voc / "SegmentationClass"
    shutil.rmtree(augmented)
    with pytest.raises(DataError, match="SegmentationClassAug"):
        VOCSegmentationDataModule(str(voc), train_split="train_aug").setup("fit")


def save_mask(path, ids: np.ndarray) -> None:
    mask = Image.fromarray(ids.astype(np.uint8)).convert("P")
    mask.putpalette(voc_palette())
    mask.save(path)


def test_voc_errors(voc):
    data = VOCSegmentationDataModule(str(voc), num_workers=0)
    first = names(voc, "train")[0]
    mask = voc / "SegmentationClass" / f"{first}.png"
    shape = data.dataset("train")[0]["mask"].shape

    save_mask(mask, np.full(shape, 21))
    with pytest.raises(DataError, match=rf"{first}\.png: mask id 21 is outside of the classes 0…20"):
        data.dataset("train")[0]
    save_mask(mask, np.zeros((3, 5)))
    with pytest.raises(DataError, match=rf"{first}\.png: the mask has 5×3 px, its image"):
        data.dataset("train")[0]
    Image.new("RGB", (5, 5)).save(mask)
    with pytest.raises(DataError, match="mode RGB"):
        data.dataset("train")[0]
    mask.unlink()
    with pytest.raises(DataError, match=rf"{first}\.png: does not exist.*train\.txt names it"):
        data.setup("fit")
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    with pytest.raises(DataError, match="the test split is empty"):
        data.setup("test")
    (voc / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt does not exist"):
        data.dataset("test")


@pytest.mark.parametrize("kind", [VOCSegmentationDataModule, CIFAR100DataModule, ImageFolderDataModule])
@pytest.mark.parametrize("exists", [False, True])
def test_missing_data_names_the_expected_layout(tmp_path, kind, exists):
    root = tmp_path / "data"
    if exists:
        root.mkdir()
    with pytest.raises(MissingDataError) as caught:
        kind(str(root)).setup("fit")
    message = str(caught.value)
    assert str(root) in message
    assert "Expected:" in message
    assert "--" not in message
    assert len(message.splitlines()) <= 5


def test_own_classes(voc):
    data = VOCSegmentationDataModule(str(voc), classes=["background", *(f"thing{i}" for i in range(30))])
    data.setup("fit")
    assert data.num_classes == 31
    save_mask(
        voc / "SegmentationClass" / f"{names(voc, 'train')[0]}.png", np.full(data.dataset("train")[0]["mask"].shape, 30)
    )
    assert data.dataset("train")[0]["mask"].max() == 30
    save_mask(voc / "x.png", np.full((2, 2), 7))
    with pytest.raises(DataError, match="mask id 7"):
        read_mask(voc / "x.png", 7)


def test_invalid_arguments_are_refused(tmp_path):
    for arguments in ({"batch_size": 0}, {"num_workers": -1}, {"crop_size": 3}, {"scale": (2.0, 1.0)}):
        with pytest.raises(UsageError, match=next(iter(arguments))):
            VOCSegmentationDataModule(str(tmp_path), **arguments)


def test_fewer_images_than_a_batch(synthetic):
    data = VOCSegmentationDataModule(str(synthetic), batch_size=64, num_workers=0)
    data.setup("fit")
    with pytest.raises(DataError, match=r"fewer than one batch of 64.*\n.*batch_size"):
        data.train_dataloader()


@pytest.mark.parametrize("count", [0, 2])
def test_a_damaged_training_image_fails_or_is_replaced(synthetic, tmp_path, capfd, count):
    root = tmp_path / "voc"
    shutil.copytree(synthetic / "VOCdevkit", root / "VOCdevkit")
    options = {"batch_size": 4, "crop_size": 32, "num_workers": count}
    data = VOCSegmentationDataModule(str(root), **options)
    data.setup("fit")
    whole = [name for batch in data.train_dataloader() for name in batch["name"]]
    damaged = data.datasets["train"].files()[0]
    damaged.write_bytes(damaged.read_bytes()[:200])
    if not count:
        with pytest.raises(DataError, match=damaged.name):
            list(data.train_dataloader())
    data = VOCSegmentationDataModule(str(root), on_error="skip", **options)
    data.setup("fit")
    found = [name for batch in data.train_dataloader() for name in batch["name"]]
    following = data.datasets["train"][1]["name"]
    assert found == [following if name == damaged.stem else name for name in whole]
    assert damaged.stem in whole
    assert damaged.name in capfd.readouterr().err
    data.setup("validate")
    damaged = data.datasets["val"].files()[0]
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(DataError, match=damaged.name):
        list(data.val_dataloader())


def test_on_error_must_be_known(synthetic):
    with pytest.raises(UsageError, match="on_error is 'ignore', must be fail or skip"):
        VOCSegmentationDataModule(str(synthetic), on_error="ignore")
