"""ImageNet in its two layouts, against torchvision's reading of the same files."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from sis_lightning.datamodules import ImageNetDataModule
from sis_lightning.datasets import ImageNetDataset
from sis_lightning.errors import DataError


@pytest.fixture
def kaggle(tmp_path) -> Path:
    """Three classes in Kaggle's layout, with names as there: with commas, and two that are the same."""
    home = tmp_path / "data" / "ilsvrc"
    names = {"n02012849": "crane", "n01440764": "tench, Tinca tinca", "n03126707": "crane"}
    rows = []
    colour = np.random.default_rng(0)
    for number, synset in enumerate(names):
        for place in ("train", "val"):
            folder = home / "ILSVRC" / "Data" / "CLS-LOC" / place / (synset if place == "train" else "")
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(2):
                name = f"ILSVRC2012_val_{8 - 2 * number - index:08d}" if place == "val" else f"{synset}_{index}"
                pixels = colour.integers(0, 255, (20 + index, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}.JPEG")
                if place == "val":
                    rows.append([name, f"{synset} 1 2 3 4 {synset} 5 6 7 8 "])
    (home / "LOC_synset_mapping.txt").write_text("".join(f"{key} {value}\n" for key, value in sorted(names.items())))
    with (home / "LOC_val_solution.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["ImageId", "PredictionString"], *rows])
    return tmp_path / "data"


@pytest.fixture
def unpacked(kaggle, tmp_path) -> Path:
    """The same images as torchvision.datasets.ImageNet leaves them: a folder for each class, and meta.bin."""
    source, home = kaggle / "ilsvrc", tmp_path / "unpacked"
    shutil.copytree(source / "ILSVRC" / "Data" / "CLS-LOC" / "train", home / "train")
    with (source / "LOC_val_solution.csv").open() as file:
        for row in csv.DictReader(file):
            folder = home / "val" / row["PredictionString"].split()[0]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"{row['ImageId']}.JPEG", folder)
    words = {"n02012849": ("crane",), "n01440764": ("tench", "Tinca tinca"), "n03126707": ("crane",)}
    torch.save((words, ["n02012849"]), home / "meta.bin")
    return home


def contents(dataset: ImageNetDataset) -> list[tuple[str, int, int]]:
    samples = [dataset[index] for index in range(len(dataset))]
    return sorted((Path(item["name"]).name, item["label"], int(item["image"].sum())) for item in samples)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_both_layouts_are_read_alike_and_as_by_torchvision(kaggle, unpacked, split):
    theirs = ImageFolder(str(unpacked / ("train" if split == "train" else "val")))
    want = sorted((Path(path).stem, label) for path, label in theirs.samples)
    flat, sorted_ = ImageNetDataset(kaggle, split), ImageNetDataset(unpacked, split)
    assert [row[:2] for row in contents(flat)] == want
    assert contents(flat) == contents(sorted_)
    assert flat.meta.class_names == sorted_.meta.class_names == ("tench", "crane (n02012849)", "crane (n03126707)")


def test_without_a_file_of_names_classes_are_synsets(unpacked):
    (unpacked / "meta.bin").unlink()
    assert ImageNetDataset(unpacked).meta.class_names == ("n01440764", "n02012849", "n03126707")


def test_what_is_missing_is_named(kaggle):
    home = kaggle / "ilsvrc"
    solution = home / "LOC_val_solution.csv"
    lines = solution.read_text().splitlines()
    solution.write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match=r"ILSVRC2012_val_00000003 has no label"):
        ImageNetDataset(kaggle, "val")
    solution.write_text("\n".join([*lines, "ILSVRC2012_val_00000077,n01440764 1 2 3 4"]))
    with pytest.raises(DataError, match=r"1 images of .* are missing, such as ILSVRC2012_val_00000077"):
        ImageNetDataset(kaggle, "val")
    solution.unlink()
    with pytest.raises(DataError, match=r"LOC_val_solution.csv does not exist"):
        ImageNetDataset(kaggle, "val")
    shutil.rmtree(home / "ILSVRC" / "Data" / "CLS-LOC" / "val")
    with pytest.raises(DataError, match=r"CLS-LOC/val does not exist\n.*\n.*Kaggle") as caught:
        ImageNetDataset(kaggle, "train")
    assert len(str(caught.value).splitlines()) <= 5


def test_the_module_crops_as_the_published_evaluation(kaggle):
    """The shorter side becomes 256 px for 224 px, of which the centre is taken."""
    data = ImageNetDataModule(str(kaggle), batch_size=2, num_workers=0)
    data.setup("validate")
    sample = data.datasets["val"][0]
    ramp = torch.arange(512, dtype=torch.float32).expand(3, 1024, 512) / 2
    image = data.eval_transform({**sample, "image": ramp.to(torch.uint8)})["image"]
    assert image.shape == (3, 224, 224)
    # Column x of 224 is at 2 (x + 16) + 1/2 of 512, whose value is half of it.
    torch.testing.assert_close(image[0, 0].float(), torch.arange(224.0) + 16, atol=1.0, rtol=0)
