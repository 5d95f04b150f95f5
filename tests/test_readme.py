"""The README: its commands run, its Python runs word for word, and the files that it names exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line
]
#: The commands of the shell blocks, and those in the table of tasks.
COMMANDS = [*BLOCKS, *re.findall(r"\| `(sis-lightning [^`]*)` \|", TEXT)]
#: What makes a command of the demo one of seconds.
SHORTER = {
    "synth": ["--images", "24", "--size", "48", "--min-object", "12"],
    "fit": ["--trainer.max_steps", "2", "--model.lr_scheduler.init_args.total_steps", "2", "--data.num_workers", "0"],
    "test": ["--data.num_workers", "0"],
    "predict": ["--data.num_workers", "0"],
}


def of_demo(line: str) -> bool:
    return line.startswith("sis-lightning") and "configs/demo.yaml" in line and "/data/coco" not in line


def test_the_demo_step_by_step(command, tmp_path):
    assert command("synth", "data/synthetic", *SHORTER["synth"]).code == 0
    ran = []
    for line in filter(of_demo, COMMANDS):
        words = shlex.split(line)
        result = command(*words[1:], *SHORTER[words[1]])
        assert result.code == 0, f"{line}\n{result.err}"
        ran.append(words[1])
    assert ran == ["fit", "test", "predict"]
    assert list(tmp_path.glob("runs/seg_voc/*/seed0/predictions/overlays/*.jpg"))


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("sis-lightning") and not of_demo(line)])
def test_every_other_command_does_what_it_says(command, synthetic, small, publish, line):
    words = [str(synthetic) if word in ("/data/coco", "/data/voc") else word for word in shlex.split(line)[1:]]
    annotations = synthetic / "coco" / "annotations" / "instances_val2017.json"
    shutil.copy(annotations, "instances_val2017.json")
    perfect = [{**row, "score": 1.0} for row in json.loads(annotations.read_text())["annotations"]]
    Path("detections.json").write_text(json.dumps(perfect))
    Path("VOCdevkit").symlink_to(synthetic / "VOCdevkit")
    Path("comp4").mkdir()
    Path("comp4", "person.txt").write_text("")
    if words[0] == "synth":
        words += SHORTER["synth"]
    if words[0] == "export":
        run = Path(words[words.index("--ckpt") + 1]).parents[1]
        assert command("fit", *small("seg_voc", steps=1), "--run_dir", run).code == 0
    if words[0] == "tables":
        Path("results").mkdir()
        for path in (*(ROOT / "results").glob("*.yaml"), ROOT / "results" / "models.json"):
            shutil.copy(path, "results")
        if "slurm" in words:
            words.append("--dry-run")
        elif "run" in words:  # what it would run takes hours on a GPU
            words = ["plan" if word == "run" else word for word in words[: words.index("--")]]
    if "--archives" in words:
        publish("det_coco", Path("downloads"))
    if words[0] == "compare":
        for folder, operator in zip(words[1:3], ("basic", "conv"), strict=True):
            if "/" in folder:
                run = [
                    *small("seg_voc", steps=1),
                    "--model.backbone.operator",
                    operator,
                    "--run_dir",
                    f"{folder}/seed0",
                ]
                assert command("fit", *run).code == command("test", *run).code == 0
        words += ["--rounds", "0"]
    if words[0] == "bench":
        words += ["--size", "32", "--rounds", "1", "--seconds", "0.01"]
    if words[0] == "fit" and "configs/overfit.yaml" in words:
        words += SHORTER["fit"]
    elif words[0] in ("fit", "test", "predict"):
        words.append("--print_config")
    result = command(*words)
    assert result.code == 0, result.err
    if "bbox" in words:
        assert re.search(r"AP\W.*1\.0000", result.out), result.out


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*The number of training batches.*")
def test_the_python_runs_word_for_word(command, small, capfd):
    fit = command("fit", *small("seg_voc", steps=1), "--run_dir", "runs/demo")
    assert fit.code == 0, fit.err
    Image.new("RGB", (64, 48), "teal").save("photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 5
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    printed = capfd.readouterr().out
    assert "recurrent1: 1 convolutions replaced" in printed
    with Image.open("prediction.png") as drawn:
        assert drawn.width >= 64


def test_the_files_that_it_names_exist():
    for name in re.findall(r"`((?:tasks|configs|datamodules|results|tests)/[\w./]*)`", TEXT):
        assert (ROOT / name).exists(), name
    figure = re.search(r"!\[.*?\]\((.*?)\)", TEXT)
    assert figure is not None
    with Image.open(ROOT / figure.group(1)) as image:
        assert image.width >= 400


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", "\n".join(BLOCKS), re.MULTILINE))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert shutil.which("make")
