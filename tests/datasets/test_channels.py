"""Images of other channels, bits and values than RGB of 8 bits: as tensors, in whole runs, and from Python."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import sis_lightning
from sis_lightning.datamodules import CIFAR100DataModule, COCOKeypointsDataModule, VOCSegmentationDataModule
from sis_lightning.datasets.crops import Crop
from sis_lightning.datasets.images import ImageReader
from sis_lightning.errors import DataError, UsageError

BANDS = 5
MEAN, STD = (0.1, 0.2, 0.3, 0.4, 0.5), (0.2, 0.1, 0.2, 0.3, 0.4)


def pixels_of(dtype: str, channels: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).random((24, 37, channels))
    return (drawn * 4095).astype(dtype) if np.dtype(dtype).kind in "ui" else (8 * drawn - 4).astype(dtype)


@pytest.mark.parametrize("layout", ["bands first", "bands last", "pages"])
@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("uint16", 0, 4095), ("int32", 100, 5000), ("float32", -4, 4), ("float64", -1, 1)]
)
def test_values_become_what_the_formula_says(tmp_path, layout, dtype, low, high):
    pixels, path = pixels_of(dtype, BANDS), tmp_path / "a.tiff"
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    if layout == "bands last":
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    elif layout == "bands first":
        tifffile.imwrite(path, first, photometric="minisblack", planarconfig="separate")
    else:
        tifffile.imwrite(path, first, photometric="minisblack")
    got = ImageReader(mean=MEAN, std=STD, value_range=(low, high)).read(path)
    wanted = ((pixels.astype(np.float64) - low) / (high - low) - MEAN) / STD
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), wanted.transpose(2, 0, 1), atol=2e-6, rtol=2e-6)
    assert ImageReader(mean=MEAN, std=STD, value_range=(low, high)).inspect(path) == ((24, 37), "")


def test_images_of_one_channel(tmp_path):
    pixels = pixels_of("uint16", 1)[..., 0]
    for name in ("a.png", "a.tif"):
        Image.fromarray(pixels).save(tmp_path / name)
        grey = ImageReader(mean=(0.5,), std=(0.25,), value_range=(0, 4095)).read(tmp_path / name)
        np.testing.assert_allclose(grey[0].numpy(), (pixels / 4095 - 0.5) / 0.25, atol=1e-6)
        three = ImageReader(value_range=(0, 4095)).read(tmp_path / name)  # for a network of three channels
        assert three.shape == (3, 24, 37)
        np.testing.assert_allclose(three[2].numpy(), (pixels / 4095 - 0.406) / 0.225, atol=1e-5)
    # 8 bits stay uint8.
    Image.fromarray((pixels // 16).astype(np.uint8)).save(tmp_path / "b.png")
    assert np.array_equal(ImageReader(mean=(0.5,), std=(0.25,)).read(tmp_path / "b.png")[0], pixels // 16)


def test_images_of_four_channels_keep_the_fourth(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 8, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    got = ImageReader(mean=(0.5,) * 4, std=(0.5,) * 4).read(tmp_path / "a.png")
    assert np.array_equal(got.numpy(), pixels.transpose(2, 0, 1))
    assert ImageReader().read(tmp_path / "a.png").shape[0] == 3


def deep_png(path: Path) -> None:
    """An RGB PNG of 16 bits per channel, all 4000, written byte by byte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (4).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    rows = zlib.compress(b"".join(b"\0" + (4000).to_bytes(2, "big") * 12 for _ in range(4)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def test_what_cannot_be_read_says_why(tmp_path):
    wide = ImageReader(mean=MEAN, std=STD, value_range=(0, 4095))
    tifffile.imwrite(tmp_path / "four.tif", pixels_of("uint16", 4), photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "five.tif", pixels_of("uint16", 5), photometric="minisblack", planarconfig="contig")
    holes = pixels_of("float32", 5)
    holes[3, 4, 2] = np.nan
    tifffile.imwrite(tmp_path / "holes.tif", holes, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "film.tif", np.zeros((2, 5, 8, 8), dtype=np.uint16), photometric="minisblack")
    (tmp_path / "torn.tif").write_bytes((tmp_path / "five.tif").read_bytes()[:300])
    deep_png(tmp_path / "deep.png")
    for name, reader, words in (
        ("four.tif", wide, "an image of 4 channels, not 5"),
        ("five.tif", ImageReader(mean=MEAN, std=STD), "its pixels are uint16"),
        ("holes.tif", wide, "NaN"),
        ("film.tif", wide, "4 axes"),
        ("torn.tif", wide, "unreadable or truncated"),
        ("gone.tif", wide, "no such image"),
        ("gone.png", wide, "no such image"),
        ("deep.png", ImageReader(value_range=(0, 65535)), "TIFF only"),
    ):
        with pytest.raises(DataError, match=f"{name}: .*{words}"):
            reader.read(tmp_path / name)
        size, fault = reader.inspect(tmp_path / name)
        assert (size, bool(fault)) == ((0, 0), True)
    assert ImageReader().read(tmp_path / "deep.png").unique().tolist() == [4000 >> 8]


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": [0.5]},
        {"std": [0.5]},
        {"mean": [0.5], "std": [0.5, 0.5]},
        {"mean": [0.5], "std": [0.0]},
        {"value_range": (1, 1)},
    ],
)
def test_options_that_contradict_each_other(tmp_path, wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        VOCSegmentationDataModule(str(tmp_path), **wrong)


def test_cifar_has_bytes(tmp_path):
    with pytest.raises(UsageError, match="RGB of 8 bits"):
        CIFAR100DataModule(str(tmp_path), value_range=(0, 1))


def test_crops_of_numbers_are_those_of_bytes():
    image = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (3, 40, 50), dtype=np.uint8))
    crop = Crop.around(np.array([5.0, 6, 30, 35]), (24, 32))
    bytes_, numbers = crop.cut(image), crop.cut(image.float())
    assert numbers.dtype == torch.float32
    assert (numbers - bytes_).abs().max() <= 1  # Pillow cuts the digits of bytes off


def multispectral(synthetic: Path, root: Path) -> Path:
    """The synthetic VOC with images of five bands of 12 bits: red, green, blue and two of their sums."""
    shutil.copytree(synthetic / "VOCdevkit", root / "VOCdevkit")
    for path in (root / "VOCdevkit/VOC2012/JPEGImages").glob("*.jpg"):
        with Image.open(path) as image:
            rgb = np.asarray(image).astype(np.uint16)
        bands = np.concatenate(
            [16 * rgb, 8 * (rgb[..., :1] + rgb[..., 1:2]), 8 * (rgb[..., 1:2] + rgb[..., 2:])], axis=2
        )
        tifffile.imwrite(path.with_suffix(".tif"), bands, photometric="minisblack", planarconfig="contig")
        path.unlink()
    return root


def test_a_whole_run_on_five_bands(command, small, synthetic, tmp_path):
    root = multispectral(synthetic, tmp_path / "own")
    options = [*small("seg_voc"), "--data.root", root, "--data.synthetic", "null", "--run_dir", "run"]
    values = ["--data.mean", str(list(MEAN)), "--data.std", str(list(STD)), "--data.value_range", "[0, 4095]"]
    refused = command("fit", *options)
    assert refused.code == 1
    assert "value_range" in refused.err
    refused = command("fit", *options, *values)
    assert refused.code == 2
    assert "images of 5 channels, but the network takes 3: set in_channels to 5" in refused.err
    options += [*values, "--model.in_channels", 5]
    fit = command("fit", *options)
    assert fit.code == 0, fit.err
    assert next(Path("run/images").glob("*.png")).is_file()
    test = command("test", *options)
    assert test.code == 0, test.err
    assert "value_range" in Path("run/config.yaml").read_text()
    checked = command("check-data", *options)
    assert checked.code == 0, checked.out
    predict = command("predict", *options, "--data.predict_path", root / "VOCdevkit/VOC2012/JPEGImages")
    assert predict.code == 0, predict.err
    rows = json.loads(Path("run/predictions/predictions.json").read_text())
    assert len(rows) == 24

    # From Python, a file and its values give the same.
    task, path = sis_lightning.load("run"), root / "VOCdevkit/VOC2012/JPEGImages" / rows[0]["name"]
    assert task.meta.value_range == (0, 4095)
    of_file = task.predict(path)
    of_values = task.predict(torch.from_numpy(tifffile.imread(path).astype(np.int32)).permute(2, 0, 1))
    assert torch.equal(of_file.mask, of_values.mask)
    with Image.open(Path("run/predictions") / rows[0]["mask"]) as written:
        assert np.array_equal(np.asarray(written), of_file.mask.numpy())
    shown = of_file.rgb.float()
    assert (shown - 255 * torch.from_numpy(tifffile.imread(path)[..., :3] / 4095).permute(2, 0, 1)).abs().max() <= 1
    with pytest.raises(UsageError, match="must be \\(5, H, W\\)"):
        task.predict(torch.zeros(3, 8, 8))
    exported = command("export", "--ckpt", "run/checkpoints/last.ckpt", "--format", "pt2")
    assert exported.code == 0, exported.err
    extra = {"metadata.json": ""}
    torch.export.load("run/model.pt2", extra_files=extra)
    assert "values minus 0, divided by 4095, minus mean" in json.loads(extra["metadata.json"])["preprocessing"]


def test_keypoint_crops_of_numbers(synthetic):
    found = []
    for value_range in (None, (0, 255)):
        data = COCOKeypointsDataModule(str(synthetic), (64, 32), batch_size=2, num_workers=0, value_range=value_range)
        data.setup(None)
        sample = next(iter(data.train_dataloader()))
        people = [crops for batch in data.val_dataloader() for crops in batch["crops"]]
        found.append((sample["image"], torch.cat(people)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.meta.mean, data.meta.std))
    for whole, exact in zip(*found, strict=True):
        assert (whole.dtype, exact.dtype) == (torch.uint8, torch.float32)
        inside = whole.amin(dim=1) > 0  # outside of the image, bytes are black and numbers the mean
        assert inside.float().mean() > 0.3
        error = (exact * std + mean) * 255 - whole
        assert error.abs().amax(dim=1)[inside].max() <= 1 + 1e-3
