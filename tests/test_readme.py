"""The README's commands run, its Python too, and what it says of files is so."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line
]
SMALLER = {
    "synth": ["--images", "24", "--size", "48", "--min-object", "12"],
    "fit": ["--trainer.max_steps", "2", "--model.lr_scheduler.init_args.total_steps", "2", "--data.num_workers", "0"],
    "test": ["--data.num_workers", "0"],
    "predict": ["--data.num_workers", "0"],
}


def test_the_demo_by_hand(command, tmp_path):
    assert command("synth", "data/synthetic", *SMALLER["synth"]).code == 0
    ran = []
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] != "sis-lightning" or not ("configs/demo.yaml" in words or words[1] == "synth"):
            continue
        result = command(*words[1:], *SMALLER[words[1]])
        assert result.code == 0, f"{line}\n{result.err}"
        ran.append(words[1])
    assert ran == ["fit", "test", "predict", "synth"]
    assert list(tmp_path.glob("runs/seg_voc/*/seed0/predictions/overlays/*.jpg"))


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("sis-lightning") and "demo.yaml" not in c])
def test_every_other_command_is_understood(command, line):
    words = shlex.split(line)[1:]
    if words[0] == "synth":
        return
    result = command(*words) if words[0] == "complexity" else command(*words, "--print_config")
    assert result.code == 0, result.err


def test_the_python(monkeypatch):
    import torch
    import torchvision

    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    printed: list[str] = []
    scope = {"torchvision": torchvision, "x": torch.zeros(1, 3, 64, 64)}
    scope["print"] = lambda item: printed.append(str(item))
    exec(code, scope)
    assert printed[0].startswith("interactive2: 17 convolutions replaced")


def test_what_it_names_is_there():
    for name in re.findall(r"`((?:tasks|configs|datamodules|results|tests)/[\w./]*)`", TEXT):
        assert (ROOT / name).exists(), name
    picture = re.search(r"!\[.*?\]\((.*?)\)", TEXT)
    with Image.open(ROOT / picture.group(1)) as image:
        assert image.width >= 400


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", "\n".join(COMMANDS), re.MULTILINE))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert shutil.which("make")
