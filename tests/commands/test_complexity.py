"""`sis-lightning complexity`."""

from __future__ import annotations

import json

import pytest

from sis_lightning.config_files import config_names


def test_the_table_labels_macs_and_takes_an_operator(command):
    result = command("complexity", "sis50", "--operator", "recurrent2", "--size", "64")
    assert result.code == 0
    assert "MACs, not FLOPs" in result.out
    assert "recurrent2" in result.out
    assert "64×64" in result.out


SIZES = {"cls_cifar": (32, 32), "cls_image": (64, 64), "seg": (96, 96), "det": (96, 96), "kpt": (128, 96)}


@pytest.mark.parametrize("task", config_names("tasks"))
def test_the_model_of_a_run_is_counted_whole(command, task):
    result = command("complexity", "--config", f"tasks/{task}.yaml", "--config", "configs/demo.yaml", "--json")
    assert result.code == 0, result.err
    (row,) = json.loads(result.out)
    (size,) = [size for start, size in SIZES.items() if task.startswith(start)]
    assert (row["name"], row["height"], row["width"]) == (task, *size)
    assert 0 < row["backbone_macs"] < row["model_macs"]


def test_options_of_a_run_are_respected(command):
    options = ["--config", "tasks/cls_cifar100.yaml", "--model.backbone", "resnet29", "--json"]
    (row,) = json.loads(command("complexity", *options).out)
    assert row["config"].startswith("resnet29")
    result = command("complexity", *options, "--operator", "basic")
    assert result.code == 2
    assert "--model.backbone.operator" in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["sis5O"], ["sis50"]), (["--operater", "basic"], ["--operater"]), (["sis50", "--operator", "basik"], ["basic"])],
)
def test_bad_arguments(command, arguments, words):
    result = command("complexity", *arguments)
    assert result.code == 2
    assert all(word in result.err for word in words)
    assert len(result.err.splitlines()) <= 5


OWN_DATA = """
from sis_lightning.datamodules import VOCSegmentationDataModule

class Mine(VOCSegmentationDataModule):
    def __init__(self, resolution: int = 96, **kwargs):
        super().__init__(**kwargs)
        self.image_size = {size}
"""


def test_the_image_size_comes_from_the_data_module_or_is_asked_for(command, tmp_path, monkeypatch):
    """Never from the names of options."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, size in {"sized": "(resolution, resolution)", "unsized": "None"}.items():
        (tmp_path / f"{name}.py").write_text(OWN_DATA.replace("{size}", size))
        own = {"class_path": f"{name}.Mine", "init_args": {"root": "data", "resolution": 64}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"data": own}))

    def complexity(name, *options):
        files = ["tasks/seg_voc.yaml", "configs/demo.yaml", f"{name}.yaml"]
        return command("complexity", *(f"--config={file}" for file in files), "--json", *options)

    own = complexity("sized")
    assert own.code == 0, own.err
    (row,) = json.loads(own.out)
    assert (row["height"], row["width"]) == (64, 64)
    unknown = complexity("unsized")
    assert unknown.code == 2
    assert "Mine has no image_size" in unknown.err
    given = complexity("unsized", "--size", "128")
    assert given.code == 0, given.err
    assert json.loads(given.out)[0]["width"] == 128
