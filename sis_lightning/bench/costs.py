"""What a run costs before and beside its training: starts at COCO's size, and checkpoints."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from sis_lightning.bench.report import Benchmark, benchmark
from sis_lightning.datasets.constants import COCO_CATEGORIES, COCO_KEYPOINTS
from sis_lightning.datasets.synthetic import write_synthetic
from sis_lightning.errors import DataError
from sis_lightning.machine import usable_cores

#: Images, boxes and persons of COCO's train2017.
_IMAGES, _BOXES, _PERSONS = 118_287, 860_001, 149_813
_LINKS = 50_000  # of one file; some file systems have a limit of 65,000
_STEPS = 12
#: Options that make steps so small that a run costs little else than what is measured.
_SMALL = {
    "cls_cifar100": [],
    "det_coco": ["--model.min_size=64", "--model.max_size=64"],
    "kpt_coco": ["--data.input_size=[64,32]"],
}


def time_costs(before: Path | None = None, images: int | None = None) -> Benchmark:
    """Times `fit` in processes of its own: to the first step at COCO's size, and with a checkpoint.

    Args:
        before: Another checkout of this project to compare with, measured alternately.
        images: Number of images of the made-up data set, boxes and persons in proportion; None for COCO's.

    Raises:
        DataError: If a run fails.
    """
    images = images or _IMAGES
    checkouts = {"": Path(__file__).parents[2], **({"before: ": before} if before else {})}
    rows: list[dict[str, str | float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_synthetic(folder / "small", images=24, size=64, seed=1, min_object=12)
        _write_coco(folder / "large" / "coco", images)

        def measure(what: str, task: str, root: str, *options: str, repeat: Sequence[str] = ("",)) -> None:
            for time_of in repeat:
                row: dict[str, str | float] = {"what": f"{what}{time_of}"}
                for label, checkout in checkouts.items():
                    run = _Fit(checkout, folder, task, folder / root, options)
                    row |= {f"{label}first step s": round(run.first_step, 2), f"{label}peak MB": round(run.peak)}
                    row |= {f"{label}longest step s": round(run.step, 2)}
                rows.append(row)

        measure("24 images", "cls_cifar100", "small")
        size = f"{images:,} images"
        measure(f"boxes, {size}", "det_coco", "large", repeat=(", first start", ", later starts"))
        measure(f"keypoints, {size}", "kpt_coco", "large", repeat=(", first start", ", later starts"))
        large = ["--model.backbone=resnet101", "--model.optimizer=Adam"]
        measure("ResNet-101 and Adam, no checkpoint", "cls_cifar100", "small", *large, "--checkpoint_every=100")
        measure("the same, one of 0.5 GB", "cls_cifar100", "small", *large, f"--checkpoint_every={_STEPS // 2}")
    note = (
        "Processes of their own, without workers, on one thread less than there are cores. Seconds from the start of "
        "the process to the end of its first step; peak memory of the process; the longest of the "
        f"{_STEPS - 2} steps after the second."
    )
    command = "sis-lightning bench --costs" + (" BEFORE" if before else "")
    return benchmark("costs", "Starts and checkpoints", command, rows, note, ("torch", "lightning", "msgspec"))


class _Fit:
    """A short fit of a checkout; its times and memory.

    Attributes:
        first_step: Seconds from the start of the process to the end of its first step.
        step: Seconds of the longest of the later steps.
        peak: Peak resident memory of the main process in MB.
    """

    def __init__(self, checkout: Path, folder: Path, task: str, root: Path, options: Sequence[str]) -> None:
        line = [sys.executable, "-u", "-m", "sis_lightning", "fit"]
        line += [f"--config=tasks/{task}.yaml", "--config=configs/demo.yaml"]  # each checkout's own
        line += [f"--data.root={root}", "--data.synthetic=null", "--data.batch_size=4", "--data.num_workers=0"]
        line += [f"--trainer.max_steps={_STEPS}", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0"]
        line += [f"--run_dir={folder}/run", "--overwrite=true", "--checkpoint_every=1000", *_SMALL[task]]
        if not any(option.startswith("--model.optimizer") for option in options):
            line += ["--model.backbone.channels=8", "--model.backbone.width=4"]
        line += ["--model.lr_scheduler=ConstantLR", *options]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(folder / checkout.name)}
        environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() - 1))  # one for what is done beside the training
        begun = time.perf_counter()
        ended: list[float] = []
        with subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
        ) as run:
            assert run.stdout is not None
            assert run.stderr is not None
            for text in run.stdout:
                if re.match(r"step +\d+/", text):
                    ended.append(time.perf_counter() - begun)
                    self.peak = _peak(run.pid)
            errors = run.stderr.read()
        if run.returncode or len(ended) < _STEPS:
            raise DataError(f"{' '.join(line)}\n  failed: {errors[-500:]}")
        self.first_step = ended[0]
        self.step = max(after - before for before, after in pairwise(ended[1:]))


def _peak(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    return int(found[1]) / 1024 if found else 0.0


def _write_coco(root: Path, images: int) -> None:
    """Writes annotation files of COCO's size, and links to a few image files."""
    rng = random.Random(0)
    names_of = {number: name for group in COCO_CATEGORIES.values() for number, name in group.items()}
    categories: list[dict[str, Any]] = [{"id": number, "name": name} for number, name in names_of.items()]
    person = {"id": 1, "name": "person", "keypoints": list(COCO_KEYPOINTS), "skeleton": []}
    for split, count in (("train2017", images), ("val2017", 20)):
        (root / split).mkdir(parents=True)
        names = [f"{number:012d}.jpg" for number in range(1, count + 1)]
        for start in range(0, count, _LINKS):
            Image.new("RGB", (64, 48), "gray").save(root / split / names[start])
            for name in names[start + 1 : start + _LINKS]:
                os.link(root / split / names[start], root / split / name)
        listed = [
            {"id": number, "file_name": name, "width": 64, "height": 48} for number, name in enumerate(names, start=1)
        ]
        files = {
            "instances": (categories, _boxes(rng, count, count * _BOXES // _IMAGES, list(names_of))),
            "person_keypoints": ([person], _persons(rng, count, count * _PERSONS // _IMAGES)),
        }
        for kind, (known, rows) in files.items():
            path = root / "annotations" / f"{kind}_{split}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"images": listed, "categories": known, "annotations": list(rows)}))


def _boxes(rng: random.Random, images: int, count: int, categories: Sequence[int]) -> Iterator[dict[str, Any]]:
    for number in range(1, count + 1):
        box = [round(rng.uniform(0, 30), 2), round(rng.uniform(0, 20), 2)]
        box += [round(rng.uniform(8, 30), 2), round(rng.uniform(8, 25), 2)]
        corners = [box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3], box[0], box[1] + box[3]]
        yield {
            **{"id": number, "image_id": rng.randint(1, images), "category_id": rng.choice(categories)},
            **{"bbox": box, "area": round(box[2] * box[3], 2), "iscrowd": 0, "segmentation": [corners * 3]},
        }


def _persons(rng: random.Random, images: int, count: int) -> Iterator[dict[str, Any]]:
    for row in _boxes(rng, images, count, [1]):
        left, top, width, height = row["bbox"]
        points = [
            value
            for _ in COCO_KEYPOINTS
            for value in (round(left + rng.random() * width), round(top + rng.random() * height), 2)
        ]
        yield {**row, "keypoints": points, "num_keypoints": len(COCO_KEYPOINTS)}
