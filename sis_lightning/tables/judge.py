"""Judges records: whether one agrees with itself, and whether it counts for a cell of a table.

Everything here follows from the record and the table spec. That a record is true cannot be seen in it: `verify`
measures again. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

from sis_lightning.files import digest
from sis_lightning.run.environment import Environment
from sis_lightning.run.recipe import Declared, recipe, settled
from sis_lightning.run.record import TestRecord, read_record
from sis_lightning.tables.data_sets import DataSet
from sis_lightning.tables.models import Model
from sis_lightning.tables.spec import Experiment

#: State of a cell with at least one record that counts, by the kind of its data.
STATES = {"official": "reproduced", "synthetic": "synthetic", "stand-in": "other data"}

# Metrics of our evaluators that are shares, those that are means over the classes, and those in percent.
_SHARE = re.compile(r"top\d+|miou|pixel_accuracy|iou/.*|A[PR]([sml]|\d+(_voc\d\d)?)?(/.*)?")
_MEAN = re.compile(r"miou|AP|AP\d+_voc\d\d")
_PERCENT = re.compile(r"top\d+_error_percent")
# Metrics are written with eight digits.
_ROUNDING = 1e-4


def environments(record: TestRecord) -> list[Environment]:
    """The environments of the test and of the starts of the training."""
    return [record.environment, *record.training.environments]


def shortcomings(record: TestRecord) -> list[str]:
    """Why a record counts for no cell, whatever it measured."""
    reasons = []
    if not record.checkpoint.finished:
        reasons.append("its weights are not from the end of the schedule")
    codes = [entry.code for entry in environments(record)]
    if not record.training.environments:
        reasons.append("the code of its training is not known")
    if any(code.dirty for code in codes):
        reasons.append("its code had uncommitted changes")
    if any(code.operators != codes[0].operators for code in codes):
        reasons.append("its operator was changed between training and test")
    if record.seed is None:
        reasons.append("it was trained without a seed")
    if record.training.changed:
        reasons.append(f"its {record.training.changed[0]} was changed during training")
    if record.checkpoint.deployed:
        reasons.append("the deployed model was tested")
    return [*reasons, *_of_schedule(record), *contradictions(record)]


def contradictions(record: TestRecord) -> list[str]:
    """What in a record contradicts itself, so that it is not what a test wrote."""
    return [*_of_metrics(record.metrics), *_of_circumstances(record)]


def _of_metrics(metrics: Mapping[str, float | None]) -> Iterator[str]:
    defined = {key.partition("/")[2]: value for key, value in metrics.items() if value is not None}
    for name, value in defined.items():
        largest = 1 if _SHARE.fullmatch(name) else 100 if _PERCENT.fullmatch(name) else None
        if largest is not None and not 0 <= value <= largest:
            yield f"its {name} is {value:g}, not within 0…{largest}"
    for name, value in defined.items():
        rank = re.fullmatch(r"(top\d+)_error_percent", name)
        if rank and rank[1] in defined and abs(100 - 100 * defined[rank[1]] - value) > 100 * _ROUNDING:
            yield f"its {name} of {value:g} is not that of its {rank[1]} of {defined[rank[1]]:g}"
        prefix = f"{'iou' if name == 'miou' else name}/"
        of_classes = [other for key, other in defined.items() if key.startswith(prefix)]
        if of_classes and _MEAN.fullmatch(name) and abs(fmean(of_classes) - value) > _ROUNDING:
            yield f"its {name} of {value:g} is not the mean over its classes, {fmean(of_classes):g}"
    for lower, upper in (("top1", "top5"), ("AP", "AP50"), ("AP75", "AP50"), ("AR", "AR50")):
        if lower in defined and upper in defined and defined[lower] > defined[upper] + _ROUNDING:
            yield f"its {lower} of {defined[lower]:g} is above its {upper} of {defined[upper]:g}"


def _of_schedule(record: TestRecord) -> Iterator[str]:
    checkpoint = record.checkpoint
    if PurePosixPath(checkpoint.file).name == "best.ckpt":
        yield "its weights are the best on the val split, not the last"
    trainer = _section(record.config, "trainer")
    steps, epochs = (_whole(trainer.get(key)) for key in ("max_steps", "max_epochs"))
    ends = [f"step {steps:,}"] * (steps > 0) + [f"epoch {epochs:,}"] * (epochs > 0)
    if trainer.get("callbacks"):
        return  # such as EarlyStopping, which is part of the recipe
    if not ends:
        yield "its configuration names no end of the training"
    elif not (checkpoint.step == steps > 0 or (checkpoint.epoch == epochs > 0 and checkpoint.step >= epochs)):
        yield f"its schedule ends at {' or '.join(ends)}, its weights are of step {checkpoint.step:,}"


def _section(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A part of a configuration; empty if it is none."""
    part: Any = config
    for name in names:
        part = part.get(name) if isinstance(part, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _whole(value: Any, default: int = -1) -> int:
    return value if isinstance(value, int) else default


def _of_circumstances(record: TestRecord) -> Iterator[str]:
    last = max((point[0] for curve in record.curves.values() for point in curve), default=0)
    if last > record.checkpoint.step:
        yield f"its curves go on to step {last:,}, its weights are of step {record.checkpoint.step:,}"
    if record.data.images < 1:
        yield f"{record.data.images} images were scored"
    if record.seed != record.config.get("seed_everything"):
        yield f"its seed is {record.seed}, in its configuration {record.config.get('seed_everything')}"
    try:
        date = datetime.fromisoformat(record.date)
        late = date.replace(tzinfo=date.tzinfo or UTC) > datetime.now(UTC) + timedelta(days=1)
    except ValueError:
        late = True
    if late:
        yield f"its date is {record.date!r}"


@dataclass(frozen=True)
class Evidence:
    """A record and the name of its file.

    Attributes:
        name: Name of its file.
        record: The record.
        recipe: Digest of the recipe, computed from the record's configuration.
        whole: Digest of all options with an effect, computed likewise.
    """

    name: str
    record: TestRecord
    recipe: str
    whole: str

    @classmethod
    def of(cls, name: str, record: TestRecord, declared: Declared | None = None) -> Evidence:
        """The record as evidence.

        Args:
            name: Name of its file.
            record: The record.
            declared: The effects that classes declare for their options; None imports the classes.
        """
        config = record.config
        return cls(name, record, digest(recipe(config, declared)), digest(settled(config, declared)))

    @property
    def seed(self) -> int:
        """Seed of the training; only of a record that counts."""
        assert self.record.seed is not None
        return self.record.seed

    @property
    def weights(self) -> str:
        """SHA-256 of the checkpoint."""
        return self.record.checkpoint.sha256

    @property
    def operators(self) -> Mapping[str, str]:
        """Digests of the source files of operators that are not built in, by name."""
        return self.record.environment.code.operators

    def judge(self, experiment: Experiment, model: Model) -> tuple[str, list[str]]:
        """Decides whether the record counts for an experiment.

        Args:
            experiment: The experiment.
            model: What the code makes of it.

        Returns:
            The state that the record gives to a cell, and the reasons why it does not count; no reasons if it counts.
        """
        run, record = experiment.run, self.record
        synthetic = record.data.identity.startswith("synthetic")
        reasons = []
        if record.data.fingerprint not in run.data.test:
            reasons.append(f"its files are not those of {run.data.title}")
        if not record.data.trained_on or not {*record.data.trained_on} <= {*run.data.train}:
            reasons.append(f"it was not trained on {run.data.title}")
        if synthetic and run.data.kind != "synthetic":
            reasons.append(f"its data is {record.data.identity}, not {run.data.title}")
        on_other_data = bool(reasons)
        if self.recipe != model.recipe:
            reasons.append("its configuration is not that of the row")
        if record.backbone != model.slug:
            reasons.append(f"it calls its backbone {record.backbone}, that of the row is {model.slug}")
        start = record.training.start_weights
        if model.pretraining and (start is None or start.recipe_hash != model.pretraining or not start.finished):
            reasons.append("its backbone did not start from the finished ImageNet run of the row")
        elif start and experiment.pretraining and not {*start.trained_on} <= {*experiment.pretraining.run.data.train}:
            reasons.append(f"its backbone was not trained on {experiment.pretraining.run.data.title}")
        changed = [
            key
            for key, change in record.tested_otherwise.items()
            # A switch that is off is the same as one that does not exist.
            if not all(value is None or value is False for value in (change.trained, change.tested))
        ]
        if changed:
            reasons.append(f"it was tested with another {changed[0]}")
        reasons += [*shortcomings(record), *_of_data(record, run.data)]
        if run.data.kind == "official" and not all(entry.code.commit for entry in environments(record)):
            reasons.append("its code belongs to no commit: it was installed, and may have been changed")
        if not on_other_data:
            return (STATES[run.data.kind] if not reasons else "other recipe"), reasons
        return ("synthetic" if synthetic else "other data"), reasons


def _of_data(record: TestRecord, data: DataSet) -> Iterator[str]:
    """What in a record contradicts the numbers of images of its data set."""
    if data.test_images is not None and record.data.images != data.test_images:
        yield f"{record.data.images:,} images were scored, {data.title} has {data.test_images:,}"
    trainer = _section(record.config, "trainer")
    batch = _whole(_section(record.config, "data", "init_args").get("batch_size"), 0)
    accumulated, epochs = max(1, _whole(trainer.get("accumulate_grad_batches"), 1)), record.checkpoint.epoch
    # With a limit of steps, the last epoch is not whole; with one of batches, none is.
    limited = _whole(trainer.get("max_steps")) > 0 or trainer.get("limit_train_batches") or trainer.get("callbacks")
    if data.train_images is None or not batch or limited:
        return
    whole = epochs * data.train_images
    seen = record.checkpoint.step * batch * accumulated
    # Of each epoch the last batch is incomplete or dropped, of detection one of each shape.
    if abs(seen - whole) > max(2 * epochs * batch * accumulated, 0.02 * whole):
        yield f"its {record.checkpoint.step:,} steps are not {epochs:,} epochs of {data.train_images:,} images"


def read_records(folder: Path, declared: Declared | None = None) -> list[Evidence]:
    """Reads all records of a folder.

    Args:
        folder: The folder.
        declared: See `Evidence.of`.

    Raises:
        DataError: If a file is not a record, or does not match its checksum.
    """
    collecting = gc.isenabled()
    gc.disable()  # takes a fifth of the time with thousands of records, in which there is nothing to collect
    try:
        paths = sorted(folder.glob("*.json"), key=lambda path: path.name)
        found: list[Evidence] = []
        known: dict[str, Evidence] = {}  # seeds of a run have one configuration, whose effects take milliseconds
        for path in paths:
            record = read_record(path)
            same = known.get(key := digest({**record.config, "seed_everything": None}))
            piece = Evidence(path.name, record, same.recipe, same.whole) if same else None
            found.append(piece or Evidence.of(path.name, record, declared))
            known.setdefault(key, found[-1])
        return found
    finally:
        if collecting:
            gc.enable()
