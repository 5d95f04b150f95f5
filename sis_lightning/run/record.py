"""The record of a test: metrics, data, weights, code and configuration.

Only `test` writes a record. It carries a checksum of its content, which tells a file that was damaged or edited by
accident. Whoever edits one on purpose can compute the checksum again: what proves a value is measuring it again, as
`sis-lightning tables verify` does. Imports nothing heavy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sis_lightning.errors import DataError
from sis_lightning.files import digest, write_text
from sis_lightning.run.environment import Environment

VERSION = 3


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    __test__: ClassVar[bool] = False  # pytest would take `TestRecord` for a class of tests


class TestData(_Plain):
    """The data of a test.

    Attributes:
        root: Folder of the data set; see `portable`.
        identity: Name of the data set by its own files, such as `VOC 2012` or `synthetic (seed 0, 240 images)`.
        fingerprint: SHA-256 of the test split.
        images: Number of images that were scored.
        trained_on: SHA-256 of the training split of each start; more than one if it was changed.
        notes: Further notes, such as the source of the person boxes.
    """

    root: str
    identity: str
    fingerprint: str
    images: int
    trained_on: list[str] = []
    notes: dict[str, str] = {}


class TestedCheckpoint(_Plain):
    """The checkpoint that was tested.

    Attributes:
        file: Its path; see `portable`.
        sha256: SHA-256 of its weights: of the tensors of its state dict, in the order of their names.
        step: Optimizer steps done.
        epoch: Epochs completed.
        finished: Whether the training had come to its end.
        deployed: Whether the deployed model was tested.
    """

    file: str
    sha256: str
    step: int
    epoch: int
    finished: bool
    deployed: bool = False


class StartWeights(_Plain):
    """The weights from which a training started.

    Attributes:
        source: `backbone_weights` or `weights` as the configuration names them.
        sha256: SHA-256 of the tensors of the backbone after they were loaded, in the order of their names.
        recipe_hash: SHA-256 of the recipe of the run that made them, as in that run's record; None for others.
        finished: Whether the training of that run had come to its end; None for others.
        trained_on: SHA-256 of the training split of each start of that run.
    """

    source: str
    sha256: str
    recipe_hash: str | None = None
    finished: bool | None = None
    trained_on: list[str] = []


class Training(_Plain):
    """The training of the tested checkpoint.

    Attributes:
        restarts: How often the run was resumed.
        seconds: Seconds of all starts together; None if a start was killed, so that nobody knows.
        devices: Maximum number of devices of all starts; None if unknown.
        changed: Options that were changed on the way.
        command: Command line of the newest start.
        environments: The different environments of its starts, in order.
        start_weights: The weights that it started from; None for random ones.
    """

    restarts: int
    seconds: float | None
    devices: int | None
    changed: list[str] = []
    command: list[str] = []
    environments: list[Environment] = []
    start_weights: StartWeights | None = None


class OptionChange(_Plain):
    """An option whose value differed between training and test.

    Attributes:
        trained: Its value in the training.
        tested: Its value in the test.
    """

    trained: Any
    tested: Any


class TestRecord(_Plain):
    """The measurements of `sis-lightning test`, and their circumstances.

    Attributes:
        version: Version of this layout.
        task: Name of the run's task, such as `seg_voc`.
        backbone: Short name of the backbone and its operator.
        primary_metric: The metric that selects the best checkpoint, such as `test/miou`.
        metrics: All metrics; None for one that is not defined, such as the IoU of a class that occurs nowhere.
        data: The data of the test.
        seed: Seed of the training; None if unknown.
        config: Resolved configuration of the training; of absolute paths in it, see `portable`.
        config_hash: SHA-256 of everything in it that has an effect.
        recipe_hash: SHA-256 of its recipe, which leaves out numerical options such as precision.
        tested_otherwise: Options of the recipe whose values differed in the test, by dotted key.
        computed_otherwise: Numerical options whose values differed in the test, such as precision, by dotted key.
        checkpoint: The checkpoint.
        training: How it was trained.
        curves: Points (steps done, value) of the training loss and of the primary metric on the val split.
        command: Command line of the test.
        environment: The code, machine and packages of the test.
        date: Time of the test in ISO 8601, UTC.
        checksum: SHA-256 of all of the above.
    """

    version: Literal[3] = 3
    task: str
    backbone: str
    primary_metric: str
    metrics: dict[str, float | None]
    data: TestData
    seed: int | None
    config: dict[str, Any]
    config_hash: str
    recipe_hash: str
    tested_otherwise: dict[str, OptionChange] = {}
    computed_otherwise: dict[str, OptionChange] = {}
    checkpoint: TestedCheckpoint
    training: Training
    curves: dict[str, list[tuple[int, float]]] = {}
    command: list[str] = []
    environment: Environment
    date: str
    checksum: str = ""


def write_record(path: Path, record: TestRecord) -> TestRecord:
    """Writes a record with its checksum; returns it with that."""
    content = record.model_dump(mode="json", exclude={"checksum"})
    return record.model_copy(update={"checksum": write_with_checksum(path, content)["checksum"]})


def read_record(path: Path) -> TestRecord:
    """Reads a record.

    Raises:
        DataError: If the file is missing, is not a record of this release, or does not match its checksum.
    """
    content = read_with_checksum(path, "sis-lightning test")
    if "metrics" not in content:
        raise DataError(f"{path}: not a record of sis-lightning test")
    if content.get("version") != VERSION:
        known = content.get("version", content.get("schema"))
        raise DataError(f"{path}: a record of version {known}, this release reads version {VERSION}: test again")
    try:
        return TestRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: not a record of sis-lightning test ({place}: {first['msg']})") from None


def write_with_checksum(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Writes plain data as JSON with a checksum of itself under `checksum`; returns it with that."""
    whole = {**content, "checksum": digest(content)}
    write_text(path, json.dumps(whole, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return whole


def read_with_checksum(path: Path, origin: str) -> dict[str, Any]:
    """Reads what `write_with_checksum` wrote.

    Args:
        path: The file.
        origin: The command that writes such files.

    Raises:
        DataError: If it is not such a file, or its content does not match its checksum.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise DataError(f"{path}: not a record of {origin}")
    if digest({key: value for key, value in content.items() if key != "checksum"}) != content["checksum"]:
        raise DataError(f"{path}: checksum mismatch, so it was damaged or edited: {origin} writes it again")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")
