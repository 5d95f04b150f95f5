"""The runs that tables need and that have not been measured yet, and how to run them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from sis_lightning.config.compose import resolve
from sis_lightning.errors import DataError, UsageError, UserError
from sis_lightning.files import digest, digest_files, write_text
from sis_lightning.machine import usable_cores
from sis_lightning.run.environment import running_code
from sis_lightning.run.history import is_running, read_history
from sis_lightning.run.record import read_record
from sis_lightning.slurm import jobs as slurm
from sis_lightning.tables.cells import Cell, fill
from sis_lightning.tables.judge import Evidence
from sis_lightning.tables.models import Model, Models
from sis_lightning.tables.spec import BUILT_IN, Experiment, TableSpec

if TYPE_CHECKING:
    from sis_lightning.models.complexity import Complexity

State = Literal["not begun", "queued", "running", "begun", "trained", "tested", "refused"]

# Table, row, experiment, model, seed and cell of a run.
_Wanted = tuple[str, str, Experiment, Model, int, Cell]
_NO_CELL = Cell(None, {}, (), "not run")
#: The code that determines parameters, MACs and configurations.
_CODE = (
    "operators/*.py",
    "backbones/*.py",
    "models/*.py",
    "tasks/*.py",
    "datamodules/*.py",
    "config/*.py",
    "option_effects.py",
    *(f"run/{name}.py" for name in ("environment", "options", "parser", "recipe", "run")),
)


@dataclass(frozen=True)
class MissingRun:
    """A run that a cell needs.

    Attributes:
        table: Id of the first table that needs it.
        row: Label of the first row that needs it.
        experiment: The experiment that it belongs to.
        model: Its model, as the code builds and counts it.
        seed: Random seed of the run.
        folder: Directory of the run, as `fit` chooses it.
        state: How far it is. `tested` means that its record can be added, `refused` that its record was added and does
            not count.
        progress: The same in words, with the step, the SLURM job or the reason.
        root: Folder with its data; None for the one that its configuration names.
        needs: Directory of the run whose weights it starts from, if that has not finished yet.
        trained_only: Whether only its weights are needed, from which other runs start, and no test.
    """

    table: str
    row: str
    experiment: Experiment
    model: Model
    seed: int
    folder: Path
    state: State
    progress: str
    root: str | None = None
    needs: Path | None = None
    trained_only: bool = False

    def __str__(self) -> str:
        what = f"weights for {self.row}" if self.trained_only else self.row
        return f"table {self.table}, {what}, seed {self.seed}"

    def options(self) -> list[str]:
        """Options of `fit` and `test`, without the seed."""
        return [*self.experiment.options(), *(["--data.root", self.root] if self.root else [])]

    @property
    def command(self) -> str:
        """The command line that continues it."""
        options = [*self.options(), "--seed_everything", str(self.seed)]
        if self.state == "trained":
            return shlex.join(["sis-lightning", "test", *options])
        begin = ("--overwrite", "true") if self.state == "refused" else ("--resume", "auto")
        return shlex.join(["sis-lightning", "fit", *options, *begin])


def code_digest() -> str:
    """Digest of the code that determines models."""
    here = Path(__file__).parents[1]
    return digest_files([path for pattern in _CODE for path in here.glob(pattern)], here)


def differences(before: Models, now: Models) -> list[str]:
    """At most five experiments whose numbers differ between two counts, each with both values."""
    found = []
    for key in before.by_key.keys() & now.by_key.keys():
        old, new = before.by_key[key], now.by_key[key]
        # What an experiment was resolved from matters only through the result.
        names = [name for name in Model.__annotations__ if name != "source"]
        for name, was, is_ in ((name, getattr(old, name, None), getattr(new, name, None)) for name in names):
            if was != is_:
                found.append(f"{key}: {name} was {was}, and is now {is_}")
                break
    added, gone = now.by_key.keys() - before.by_key.keys(), before.by_key.keys() - now.by_key.keys()
    if before.declared != now.declared:
        found.append("the effects that options declare are not those of the code")
    found += [f"{len(added)} rows are new, such as {min(added)}"] if added else []
    found += [f"{len(gone)} rows no longer exist, such as {min(gone)}"] if gone else []
    return [*sorted(found)[:5], *([f"and {len(found) - 5} more"] if len(found) > 5 else [])]


def count(spec: TableSpec, known: Models) -> Models:
    """Resolves and counts every experiment of a table spec, including rows of operators that users registered.

    A row of a user's operator that cannot be built stays empty, and says why on stderr.

    Args:
        spec: The tables, without those rows.
        known: Earlier counts; they are kept for experiments that cannot have changed. Without any, all are counted.

    Raises:
        UsageError: If an experiment is impossible; the message names it.
    """
    from sis_lightning.operators import list_operators, operator_class
    from sis_lightning.run.recipe import effects_of_path

    operators, code = tuple(list_operators()), code_digest()
    # Whether operators that are not built in have changed is not known.
    kept = known.by_key if known.code == code else {}
    found: dict[str, Model | None] = {}
    experiments = spec.with_operators(operators).experiments()
    changed = []
    for key, experiment in experiments.items():
        fields = dict(experiment.fields)
        operator = fields.get("operator")
        if operator and fields.get("steps", 2) != 2 and not operator_class(operator).recurrent:
            found[key] = None
            continue
        built_in = operator is None or operator in BUILT_IN
        model = kept.get(key) if built_in else None
        found[key] = model
        if model is None or model.source != _source(experiment):
            changed.append(experiment)
    if len(changed) > 9:
        print(f"counting {len(changed)} rows, which takes a second or two each", file=sys.stderr)
    sizes: dict[str, Complexity] = {}
    classes = {*known.declared} if known.code == code else set()
    for experiment in changed:
        try:
            found[experiment.key] = _resolve(experiment, sizes, classes)
        except BrokenOperatorError as error:
            found[experiment.key] = None
            print(f"note: {error}", file=sys.stderr)
    for key, experiment in experiments.items():  # each is behind the one that it starts from
        model, start = found[key], experiment.pretraining
        if model is not None and start is not None and (first := found[start.key]) is not None:
            found[key] = dataclasses.replace(model, pretraining=first.recipe)
    return Models(code, operators, found, {path: effects_of_path(path) for path in sorted(classes)})


def _source(experiment: Experiment) -> str:
    """Digest of what an experiment is resolved from."""
    try:
        return digest(list(resolve(experiment.options())))
    except UserError as error:
        raise type(error)(f"tables, {experiment.key}: {error}") from None


class BrokenOperatorError(UsageError):
    """An operator of a user cannot be built or run."""


def _resolve(experiment: Experiment, sizes: dict[str, Complexity], classes: set[str]) -> Model:
    """Builds the model of an experiment, and counts it.

    Args:
        experiment: The experiment.
        sizes: The networks that were counted before; runs that differ in how they train have the same.
        classes: The paths of the task and DataModule are added to these.
    """
    from sis_lightning.run.recipe import recipe
    from sis_lightning.run.run import Run
    from sis_lightning.tables.counting import count_run
    from sis_lightning.tasks.base import BaseTask

    source = _source(experiment)
    try:
        run = Run.from_arguments(experiment.options())
        given = run.config["model"]["init_args"]
        classes |= {run.config[part]["class_path"] for part in ("model", "data")}
        training = BaseTask.option_effects.keys() - {"backbone", "num_classes", "operator", "in_channels"}
        network = {name: value for name, value in given.items() if name not in training}
        key = digest([run.config["model"]["class_path"], network, run.image_size])
        if key not in sizes:
            sizes[key] = count_run(run, experiment.run.name)
        size = sizes[key]
    except UserError as error:
        raise type(error)(f"tables, {experiment.key}: {error}") from None
    except Exception as error:
        operator = dict(experiment.fields).get("operator")
        if operator is None or operator in BUILT_IN:
            raise
        raise BrokenOperatorError(
            f"tables, {experiment.key}: the operator '{operator}' cannot be built or run:\n"
            f"  {type(error).__name__}: {str(error).partition(chr(10))[0]}\n"
            "  Its row stays empty. Repair it, or remove it from $SIS_OPERATORS or uninstall its package."
        ) from error
    image = (size.height, size.width)
    return Model(digest(recipe(run.config)), size.config, size.model_parameters, size.model_macs, image, source)


def missing(
    spec: TableSpec,
    evidence: Sequence[Evidence],
    models: Models,
    seeds: Sequence[int] | None = None,
    roots: Mapping[str, str] | None = None,
) -> list[MissingRun]:
    """The runs that cells need and do not have yet, each once, in the order of the tables.

    Before them come the runs whose weights they start from, as far as these have not finished.

    Args:
        spec: The tables, or some of their rows.
        evidence: All records.
        models: The models of the experiments.
        seeds: Seeds, instead of those that each run needs.
        roots: Folders with the data of runs, by the names of the runs.
    """
    wanted: dict[Path, _Wanted] = {}
    for filled in fill(spec, evidence, models):
        for line in filled.lines:
            for column, cell in zip(filled.table.columns, line.cells, strict=True):
                experiment = line.row.experiment(column)
                model = models.by_key[experiment.key]
                if column.counted or model is None:
                    continue
                for seed in experiment.run.seeds if seeds is None else seeds:
                    if seed not in cell.values:
                        entry = (filled.table.id, line.row.label, experiment, model, seed, cell)
                        wanted.setdefault(directory(experiment, model, seed), entry)
    starts: dict[Path, _Wanted] = {}
    for table, row, experiment, *_ in wanted.values():
        start = experiment.pretraining
        if start is not None and (first := models.by_key[start.key]) is not None:
            seed = start.run.seeds[0]
            starts.setdefault(directory(start, first, seed), (table, row, start, first, seed, _NO_CELL))
    queue = slurm.queued_runs([*starts, *wanted])
    found: list[MissingRun] = []
    for folder, (table, row, experiment, model, seed, cell) in [*starts.items(), *wanted.items()]:
        state, progress = _progress(folder, evidence, cell)
        if job := queue.get(folder):
            state, progress = "queued", f"queued (SLURM's job {job})"
        if folder in starts and is_finished(folder):
            continue
        needs = None
        if (start := experiment.pretraining) is not None and (first := models.by_key[start.key]) is not None:
            needs = directory(start, first, start.run.seeds[0])
            needs = None if is_finished(needs) else needs
        root = (roots or {}).get(experiment.run.name)
        found.append(
            MissingRun(table, row, experiment, model, seed, folder, state, progress, root, needs, folder in starts)
        )
    return found


def is_finished(folder: Path) -> bool:
    """Whether the training of a run has come to its end."""
    starts = read_history(folder)
    return bool(starts) and starts[-1].how == "finished"


def directory(experiment: Experiment, model: Model, seed: int) -> Path:
    """The directory that `fit` chooses for a run."""
    return Path("runs", experiment.run.name, model.slug, f"seed{seed}")


def running(spec: TableSpec, models: Models) -> Iterator[str]:
    """Keys of experiments that are being trained from the current directory."""
    for key, experiment in spec.experiments().items():
        model = models.by_key.get(key)
        if model is not None:
            folder = directory(experiment, model, 0).parent
            if any(is_running(path) for path in folder.glob("seed*")):
                yield key


def _progress(folder: Path, evidence: Sequence[Evidence], cell: Cell) -> tuple[State, str]:
    if is_running(folder):
        return "running", "running"
    starts = read_history(folder)
    if not starts:
        return "not begun", "not begun"
    if starts[-1].how == "finished":
        if not (folder / "test.json").is_file():
            return "trained", "trained"
        try:
            checksum = read_record(folder / "test.json").checksum
        except DataError as error:
            return "trained", f"trained, but must be tested again: {error}"
        name = next((piece.name for piece in evidence if piece.record.checksum == checksum), None)
        why = next((reason.partition(": ")[2] for reason in cell.reasons if name and reason.startswith(name)), "")
        if name:
            return "refused", f"tested, but does not count{f': {why}' if why else ''}"
        return "tested", f"tested: sis-lightning tables add {folder}"
    return "begun", f"begun (step {starts[-1].step:,})"


def add(paths: Iterable[Path], folder: Path) -> list[Path]:
    """Copies records to a results folder.

    Args:
        paths: Files, or folders in which every `test.json` is taken.
        folder: Folder of records.

    Returns:
        Copies that were not there yet.

    Raises:
        DataError: If there is none, or one of them is not a record or was edited; then none is copied.
    """
    found = list(itertools.chain.from_iterable(sorted(p.rglob("test.json")) if p.is_dir() else [p] for p in paths))
    if not found:
        raise DataError(f"no test.json in {', '.join(map(str, paths))}: sis-lightning test writes it")
    added = []
    for path, record in [(path, read_record(path)) for path in found]:  # all are read before one is copied
        name = f"{record.task}-{record.backbone}-seed{record.seed}-{record.checksum[:8]}.json"
        place = folder / name
        if place.is_file():
            continue
        write_text(place, path.read_text(encoding="utf-8"))
        added.append(place)
    return added


def to_do(wanted: Sequence[MissingRun], records: Path, extra: Sequence[str]) -> list[MissingRun]:
    """Adds the records of tested runs, prints what cannot be run, and returns what is left to train or test.

    Args:
        wanted: The runs.
        records: Folder of records.
        extra: Further options of `fit` and `test`.

    Raises:
        UsageError: If the options change the recipe.
    """
    if extra:
        for entry in {entry.experiment.run.name: entry for entry in wanted}.values():
            _refuse_other_recipes(entry, extra)
    left = []
    for entry in wanted:
        if entry.state == "tested" and not entry.trained_only:
            _add_record(entry, records)
        elif entry.state == "refused":
            print(f"{entry}: {entry.progress}\n  to train it again: {entry.command}")
        elif entry.state in ("running", "queued"):
            print(f"{entry}: {entry.progress}")
        else:
            left.append(entry)
    here = running_code({})
    if left and here.dirty:
        print(
            "note: the code has uncommitted changes. Its records will not count in any table: commit the changes "
            "first, or run from a clean clone",
            file=sys.stderr,
        )
    elif not here.commit and any(entry.experiment.run.data.kind == "official" for entry in left):
        print(
            "note: the code is installed and belongs to no commit. Its records on published data will not count as "
            "reproduced: run from a clone",
            file=sys.stderr,
        )
    return left


def _add_record(entry: MissingRun, records: Path, prefix: str = "") -> None:
    add([entry.folder / "test.json"], records)
    record = read_record(entry.folder / "test.json")
    _say(f"{prefix}{entry}: {record.primary_metric} {record.metrics.get(record.primary_metric)}")
    for reason in Evidence.of(str(entry.folder), record).judge(entry.experiment, entry.model)[1][:1]:
        _say(f"{prefix}{entry}: does not count: {reason}", sys.stderr)


def _say(what: str, to: TextIO | None = None) -> None:
    # One write, since print writes the line end separately and lines of several threads would mix.
    to = to or sys.stdout
    to.write(f"{what}\n")
    to.flush()


def run_here(wanted: Sequence[MissingRun], records: Path, jobs: int, extra: Sequence[str]) -> int:
    """Trains (or resumes) and tests runs in processes of their own, and adds their records.

    Args:
        wanted: The runs.
        records: Folder of records.
        jobs: How many at the same time, each with its share of the cores.
        extra: Further options of `fit` and `test`.

    Returns:
        How many failed.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))} if jobs > 1 else {}

    def one(number: int, entry: MissingRun) -> bool:
        place = f"[{number}/{len(wanted)}] "
        if is_running(entry.folder):  # it was started meanwhile
            _say(f"{place}{entry}: is being trained by another process")
            return True
        log = entry.folder.with_name(f"{entry.folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        _say(f"{place}{entry}: {log}")
        if entry.needs and not is_finished(entry.needs):
            _say(f"{place}{entry}: waits for the weights of {entry.needs}", sys.stderr)
            return False
        options = [*entry.options(), "--seed_everything", str(entry.seed), *extra]
        commands = [["fit", *options, "--resume", "auto"], *([] if entry.trained_only else [["test", *options]])]
        for command in commands:
            line = [sys.executable, "-m", "sis_lightning", *command]
            with log.open("a", encoding="utf-8") as file:
                code = subprocess.run(
                    line, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **threads}, check=False
                ).returncode
            if code:
                text = log.read_text(encoding="utf-8", errors="replace").strip()
                # Our own message, or the end of a traceback.
                said = text.rpartition("\nsis-lightning: ")[2] if code in (1, 2) else text.rpartition("\n")[2]
                _say(f"{place}{entry}: {command[0]} failed ({code}): {said[-500:]}", sys.stderr)
                return False
        if not entry.trained_only:
            _add_record(entry, records, place)
        return True

    numbered = list(enumerate(wanted, 1))
    done: list[bool] = []
    for first in (True, False):  # the weights first
        chosen = [(number, entry) for number, entry in numbered if entry.trained_only is first]
        with ThreadPoolExecutor(jobs) as pool:
            done += pool.map(lambda pair: one(*pair), chosen)
    return done.count(False)


def _refuse_other_recipes(entry: MissingRun, extra: Sequence[str]) -> None:
    from sis_lightning.run.recipe import changes, recipe
    from sis_lightning.run.run import Run

    for option in extra:
        if (key := option.partition("=")[0]) in ("--run_dir", "--task", "--seed_everything", "--resume", "--overwrite"):
            raise UsageError(f"tables run sets {key} itself: leave it out, or run fit and test yourself")
    other = recipe(Run.from_arguments([*entry.options(), *extra]).config)
    if digest(other) == entry.model.recipe:
        return
    plain = recipe(Run.from_arguments(entry.options()).config)
    if changed := [f"  {key}: {old!r}, with these options {new!r}\n" for key, old, new in changes(plain, other)]:
        raise UsageError(
            f"{shlex.join(extra)} changes the recipe, so that no cell would count these runs:\n"
            f"{''.join(changed[:2])}  Leave it out, or run fit and test yourself."
        )


def submissions(wanted: Sequence[MissingRun], extra: Sequence[str]) -> Iterator[list[str]]:
    """Options of `submit` for missing runs: one job array over the seeds of each experiment.

    A run that needs another one's weights waits for the job of that run, which must have been submitted when its
    options are asked for.

    Raises:
        UsageError: If a run is needed that neither has finished nor has a job.
    """
    seeds: dict[str, list[int]] = {}
    first: Mapping[str, MissingRun] = {entry.experiment.key: entry for entry in reversed(wanted)}
    for entry in wanted:
        seeds.setdefault(entry.experiment.key, []).append(entry.seed)
    for key, chosen in seeds.items():
        entry = first[key]
        line = [*entry.options(), "--array", f"seeds={','.join(map(str, chosen))}", *extra]
        if not entry.trained_only:
            line.append("--test")
        if entry.needs and not is_finished(entry.needs):
            job = slurm.queued_runs([entry.needs]).get(entry.needs)
            if job is not None:
                line += ["--dependency", f"afterok:{job}"]
            elif "--dry-run" in extra:
                print(f"# with --dependency afterok: the job of {entry.needs}")
            else:
                raise UsageError(f"{entry} starts from the weights of {entry.needs}, which has no job: submit it first")
        yield line
