"""The README's commands run, its Python too, and what it says of files is so."""

from __future__ import annotations

import json
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
        if words[0] != "sis-lightning" or "/data/coco" in words:
            continue
        if "configs/demo.yaml" not in words and words[1] != "synth":
            continue
        result = command(*words[1:], *SMALLER[words[1]])
        assert result.code == 0, f"{line}\n{result.err}"
        ran.append(words[1])
    assert ran == ["fit", "test", "predict", "synth"]
    assert list(tmp_path.glob("runs/seg_voc/*/seed0/predictions/overlays/*.jpg"))


def others(line: str) -> bool:
    by_hand = "demo.yaml" in line and "/data/coco" not in line
    return line.startswith("sis-lightning") and not by_hand and not line.startswith("sis-lightning synth")


@pytest.mark.parametrize("line", list(filter(others, COMMANDS)))
def test_every_other_command_does_what_it_says(command, synthetic, small, publish, line):
    words = [str(synthetic) if word == "/data/coco" else word for word in shlex.split(line)[1:]]
    annotations = synthetic / "coco" / "annotations" / "instances_val2017.json"
    shutil.copy(annotations, "instances_val2017.json")
    perfect = [{**row, "score": 1.0} for row in json.loads(annotations.read_text())["annotations"]]
    Path("detections.json").write_text(json.dumps(perfect))
    Path("VOCdevkit").symlink_to(synthetic / "VOCdevkit")
    Path("comp4").mkdir()
    Path("comp4", "person.txt").write_text("")
    if words[0] == "export":
        run = Path(words[words.index("--ckpt") + 1]).parents[1]
        assert command("fit", *small("seg_voc", steps=1), "--run_dir", run).code == 0
    if words[0] == "tables":
        Path("results").mkdir()
        for path in (*(ROOT / "results").glob("*.yaml"), ROOT / "results" / "models.json"):
            shutil.copy(path, "results")
        if "slurm" in words:
            words.append("--dry-run")
        elif "run" in words:  # what it would run is hours on a GPU
            words = ["plan" if word == "run" else word for word in words[: words.index("--")]]
    if "--archives" in words:
        publish("det_coco", Path("downloads"))
    if words[0] == "compare":
        words += ["--rounds", "0"]
    if words[0] == "bench":
        words += ["--size", "32", "--rounds", "1", "--seconds", "0.01"]
    if words[0] == "fit" and "configs/overfit.yaml" in words:
        words += SMALLER["fit"]
    elif words[0] in ("fit", "test", "predict"):
        words.append("--print_config")
    result = command(*words)
    assert result.code == 0, result.err
    if "bbox" in words:
        assert re.search(r"AP\W.*1\.0000", result.out), result.out


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
