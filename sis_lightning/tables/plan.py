"""What the tables want and nobody has measured yet: which runs these are, and how they come about."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from sis_lightning.config.compose import WEIGHTS_IN_16_BITS, changes, recipe, resolve
from sis_lightning.errors import DataError, UsageError, UserError
from sis_lightning.files import digest, digest_files, write_text
from sis_lightning.machine import usable_cores
from sis_lightning.run.history import is_running, last_row, read_starts
from sis_lightning.run.record import code, read_record
from sis_lightning.slurm import jobs as slurm
from sis_lightning.tables.cells import Cell, Evidence, Model, Models, fill
from sis_lightning.tables.spec import BUILT_IN, TableSpec, Experiment

State = Literal["not begun", "queued", "running", "begun", "trained", "tested", "refused"]

#: What settles parameters, MACs and configurations.
_PARTS = (
    "operators/*.py",
    "backbones/*.py",
    "models/*.py",
    "tasks/*.py",
    "datamodules/*.py",
    "config/*.py",
    "run/lightning_cli.py",
)


@dataclass(frozen=True)
class MissingRun:
    """A run that a cell waits for.

    Attributes:
        table: The first that wants it.
        row: Its label.
        experiment: What it measures.
        model: What that resolves to.
        seed: Of it.
        folder: Its directory, as `fit` chooses it.
        state: How far it is; `tested`: its record is to be added; `refused`: that was, and does not count.
        progress: The same in words, with the step, the job or the reason.
        root: Where its data lies; None for where its configuration says.
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

    def __str__(self) -> str:
        return f"table {self.table}, {self.row}, seed {self.seed}"

    def options(self) -> list[str]:
        """Of `fit` and `test`, without the seed."""
        return [*self.experiment.options(), *(["--data.root", self.root] if self.root else [])]

    @property
    def command(self) -> str:
        """What a user types."""
        options = [*self.options(), "--seed_everything", str(self.seed)]
        if self.state == "trained":
            return shlex.join(["sis-lightning", "test", *options])
        anew = ("--overwrite", "true") if self.state == "refused" else ("--resume", "auto")
        return shlex.join(["sis-lightning", "fit", *options, *anew])


def code_digest() -> str:
    """Of the code that settles what an experiment resolves to."""
    here = Path(__file__).parents[1]
    return digest_files([path for pattern in _PARTS for path in here.glob(pattern)], here)


def differences(before: Models, now: Models) -> list[str]:
    """Experiments of which the code gives other numbers than were kept, with both."""
    found = []
    for key in before.by_key.keys() & now.by_key.keys():
        old, new = before.by_key[key], now.by_key[key]
        # Of what it was resolved from, it matters alone what came of it.
        names = [name for name in Model.__annotations__ if name != "source"]
        for name, was, is_ in ((name, getattr(old, name, None), getattr(new, name, None)) for name in names):
            if was != is_:
                found.append(f"{key}: {name} was {was}, the code gives {is_}")
                break
    added, gone = now.by_key.keys() - before.by_key.keys(), before.by_key.keys() - now.by_key.keys()
    found += [f"{len(added)} rows are new, such as {min(added)}"] if added else []
    found += [f"{len(gone)} rows are no more, such as {min(gone)}"] if gone else []
    return [*sorted(found)[:5], *([f"and {len(found) - 5} more"] if len(found) > 5 else [])]


def count(spec: TableSpec, known: Models) -> Models:
    """Resolves and counts every experiment of the spec, with rows for operators that users registered.

    Args:
        spec: The tables, without those rows.
        known: Kept where the code is the same.

    Raises:
        UsageError: For an experiment that cannot be: of which table.
    """
    from sis_lightning.operators import operator_class, list_operators

    operators, code = list_operators(), code_digest()
    # Of operators that are not ours, nobody tells whether they changed.
    kept = known.by_key if known.code == code else {}
    found: dict[str, Model | None] = {}
    experiments = spec.with_operators(operators).experiments()
    anew = []
    for key, experiment in experiments.items():
        fields = dict(experiment.fields)
        operator = fields.get("operator")
        if operator and fields.get("steps", 2) != 2 and not operator_class(operator).recurrent:
            found[key] = None
            continue
        ours = operator is None or operator in BUILT_IN
        model = kept.get(key) if ours else None
        found[key] = model
        if model is None or model.source != _source(experiment):
            anew.append(experiment)
    if len(anew) > 9:
        print(f"counting {len(anew)} rows anew, as code, YAML or specs changed: a minute or two", file=sys.stderr)
    return Models(code, operators, {**found, **{experiment.key: _resolve(experiment) for experiment in anew}})


def _source(experiment: Experiment) -> str:
    """Digest of what an experiment is resolved from."""
    try:
        return digest(list(resolve(experiment.options())))
    except UserError as error:
        raise type(error)(f"tables, {experiment.key}: {error}") from None


def _resolve(experiment: Experiment) -> Model:
    from sis_lightning.models import complexity
    from sis_lightning.run.lightning_cli import run

    try:
        resolved = resolve(experiment.options())
        source = digest(list(resolved))
        with contextlib.redirect_stdout(io.StringIO()):
            cli = run(None, *resolved)
            size = complexity.of_cli(cli, experiment.run.name)
    except UserError as error:
        raise type(error)(f"tables, {experiment.key}: {error}") from None
    except Exception as error:
        operator = dict(experiment.fields).get("operator")
        if operator is None or operator in BUILT_IN:
            raise
        raise UsageError(
            f"tables, {experiment.key}: the operator '{operator}' cannot be built or run:\n"
            f"  {type(error).__name__}: {str(error).partition(chr(10))[0]}\n"
            "  Mend it, or leave it out: of $SIS_OPERATORS, or of what is installed."
        ) from error
    image = (size.height, size.width)
    return Model(digest(recipe(cli.resolved)), size.config, size.model_parameters, size.model_macs, image, source)


def missing(
    spec: TableSpec,
    evidence: Sequence[Evidence],
    models: Models,
    seeds: Sequence[int] | None = None,
    roots: Mapping[str, str] | None = None,
) -> list[MissingRun]:
    """The runs that cells wait for, each once, in the order of the tables.

    Args:
        spec: The tables, or some of their rows.
        evidence: What was measured.
        models: What the experiments resolve to.
        seeds: In place of those that each run wants.
        roots: Where the data of a run lies, by the run's name.
    """
    wanted: dict[Path, tuple[str, str, Experiment, Model, int, Cell]] = {}
    for filled in fill(spec, evidence, models):
        for line in filled.lines:
            for column, cell in zip(filled.table.columns, line.cells, strict=True):
                experiment = line.row.experiment(column)
                model = models.by_key[experiment.key]
                if column.counted or model is None:
                    continue
                for seed in experiment.run.seeds if seeds is None else seeds:
                    if seed not in cell.values:
                        first = (filled.table.id, line.row.label, experiment, model, seed, cell)
                        wanted.setdefault(directory(experiment, model, seed), first)
    queue = _queue(wanted)
    found = []
    for folder, (table, row, experiment, model, seed, cell) in wanted.items():
        state, progress = _progress(folder, evidence, cell)
        if job := queue.get(folder):
            state, progress = "queued", f"queued (SLURM's job {job})"
        root = (roots or {}).get(experiment.run.name)
        found.append(MissingRun(table, row, experiment, model, seed, folder, state, progress, root))
    return found


def _queue(folders: Iterable[Path]) -> dict[Path, str]:
    """The runs that SLURM has, waiting or at work, with their jobs: a run's own, and those of the arrays above."""
    folders = list(folders)
    submitted = {
        job: folder
        for folder in dict.fromkeys([*folders, *(folder.parent for folder in folders)])
        if (folder / "jobs.txt").is_file()
        for job in (folder / "jobs.txt").read_text().split()
    }
    found = {}
    for element in slurm.queued(list(submitted)):
        job, array, seed = element.partition("_")
        if job in submitted:
            found[submitted[job] / f"seed{seed}" if array else submitted[job]] = element
    return found


def directory(experiment: Experiment, model: Model, seed: int) -> Path:
    """Where `fit` keeps the run."""
    return Path("runs", experiment.run.name, model.slug, f"seed{seed}")


def busy(spec: TableSpec, models: Models) -> Iterator[str]:
    """Keys of experiments that a fit here is busy with."""
    for key, experiment in spec.experiments().items():
        model = models.by_key.get(key)
        if model is not None:
            folder = directory(experiment, model, 0).parent
            if any(is_running(path) for path in folder.glob("seed*")):
                yield key


def _progress(folder: Path, evidence: Sequence[Evidence], cell: Cell) -> tuple[State, str]:
    if is_running(folder):
        return "running", "running"
    starts = read_starts(folder)
    if not starts:
        return "not begun", "not begun"
    if starts[-1]["how"] == "finished":
        if not (folder / "test.json").is_file():
            return "trained", "trained"
        try:
            checksum = read_record(folder / "test.json")["checksum"]
        except DataError as error:
            return "trained", f"trained, but to be tested again: {error}"
        name = next((piece.name for piece in evidence if piece.record["checksum"] == checksum), None)
        why = next((reason.partition(": ")[2] for reason in cell.reasons if name and reason.startswith(name)), "")
        if name:
            return "refused", f"tested, but does not count{f', as {why}' if why else ''}"
        return "tested", f"tested: sis-lightning tables add {folder}"
    newest = last_row(folder)
    return "begun", f"begun (step {int(newest['step']) + 1 if 'step' in newest else 0:,})"


def add(paths: Iterable[Path], folder: Path) -> list[Path]:
    """Takes records into a results folder, byte by byte: those given, and all `test.json` below folders.

    Returns:
        Those that were not there yet.

    Raises:
        DataError: For one that was edited, or none at all.
    """
    found = list(itertools.chain.from_iterable(sorted(p.rglob("test.json")) if p.is_dir() else [p] for p in paths))
    if not found:
        raise DataError(f"no test.json below {', '.join(map(str, paths))}: sis-lightning test writes it")
    added = []
    for path, record in [(path, read_record(path)) for path in found]:  # all of them, before any is taken
        name = f"{record['task']}-{record['backbone']}-seed{record['seed']}-{record['checksum'][:8]}.json"
        place = folder / name
        if place.is_file():
            continue
        write_text(place, path.read_text(encoding="utf-8"))
        added.append(place)
    return added


def to_do(wanted: Sequence[MissingRun], records: Path, extra: Sequence[str]) -> list[MissingRun]:
    """What is left to be trained or tested: takes in what was tested, leaves the rest as it is, and says so.

    Args:
        wanted: The runs.
        records: Where their records go.
        extra: Further options of `fit` and `test`.

    Raises:
        UsageError: For options that make other runs of them than the cells wait for.
    """
    if extra:
        for entry in {entry.experiment.run.name: entry for entry in wanted}.values():
            _refuse_other_recipes(entry, extra)
    left = []
    for entry in wanted:
        if entry.state == "tested":
            _take_in(entry, records)
        elif entry.state == "refused":
            print(f"{entry}: {entry.progress}\n  anew: {entry.command}")
        elif entry.state in ("running", "queued"):
            print(f"{entry}: {entry.progress}")
        else:
            left.append(entry)
    here = code({})
    if left and here.get("dirty"):
        print(
            "note: the code here has changes that no commit holds. Records of it count in no table: commit them first, "
            "or run from a clone",
            file=sys.stderr,
        )
    elif "commit" not in here and any(entry.experiment.run.data.kind == "official" for entry in left):
        print(
            "note: the code here is of no commit, as it was installed. Nothing that it measures on the published data "
            "is called reproduced: run from a clone",
            file=sys.stderr,
        )
    return left


def _take_in(entry: MissingRun, records: Path, number: str = "") -> None:
    add([entry.folder / "test.json"], records)
    record = read_record(entry.folder / "test.json")
    _say(f"{number}{entry}: {record['headline']} {record['metrics'].get(record['headline'])}")
    piece = Evidence(str(entry.folder), record, digest(recipe(record["config"])))
    for reason in piece.judged(entry.experiment, entry.model)[1][:1]:
        _say(f"{number}{entry}: does not count, as {reason}", sys.stderr)


def _say(what: str, to: TextIO | None = None) -> None:
    # In one write: print writes the line's end by itself, and another thread's line comes between.
    to = to or sys.stdout
    to.write(f"{what}\n")
    to.flush()


def run_here(wanted: Sequence[MissingRun], records: Path, jobs: int, extra: Sequence[str]) -> int:
    """Trains and tests what is missing, and takes the records in; goes on with what was begun.

    Args:
        wanted: The runs.
        records: Where their records go.
        jobs: How many at once, each with its share of the cores.
        extra: Further options of `fit` and `test`.

    Returns:
        How many failed.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))} if jobs > 1 else {}

    def one(number: int, entry: MissingRun) -> bool:
        place = f"[{number}/{len(wanted)}] "
        if is_running(entry.folder):  # since the others were begun
            _say(f"{place}{entry}: another fit is at it")
            return True
        log = entry.folder.with_name(f"{entry.folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        _say(f"{place}{entry}: {log}")
        options = [*entry.options(), "--seed_everything", str(entry.seed), *extra]
        for command in (["fit", *options, "--resume", "auto"], ["test", *options]):
            line = [sys.executable, "-m", "sis_lightning", *command]
            with log.open("a", encoding="utf-8") as file:
                code = subprocess.run(
                    line, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **threads}, check=False
                ).returncode
            if code:
                text = log.read_text(encoding="utf-8", errors="replace").strip()
                # Our own words for it, or the end of a traceback.
                said = text.rpartition("\nsis-lightning: ")[2] if code in (1, 2) else text.rpartition("\n")[2]
                _say(f"{place}{entry}: {command[0]} failed ({code}): {said[-500:]}", sys.stderr)
                return False
        _take_in(entry, records, place)
        return True

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(one, range(1, len(wanted) + 1), wanted))
    return done.count(False)


def _refuse_other_recipes(entry: MissingRun, extra: Sequence[str]) -> None:
    from sis_lightning.run.lightning_cli import run

    for option in extra:
        if (key := option.partition("=")[0]) in ("--run_dir", "--task", "--seed_everything", "--resume", "--overwrite"):
            raise UsageError(f"tables run settles {key} itself: leave it out, or run fit and test by hand")
    layers, given = resolve([*entry.options(), *extra])
    # `run` without a subcommand computes in 32 bits, whatever is asked for.
    asked = [str(layers.get("trainer", {}).get("precision")), *" ".join(given).replace("=", " ").split()]
    if coarse := [text for text in asked if text in WEIGHTS_IN_16_BITS]:
        raise UsageError(
            f"--trainer.precision {coarse[0]} is another recipe, and no cell would count it: bf16-mixed is not"
        )
    with contextlib.redirect_stdout(io.StringIO()):
        other = recipe(run(None, layers, given).resolved)
        if digest(other) == entry.model.recipe:
            return
        plain = recipe(run(None, *resolve(entry.options())).resolved)
    if changed := [f"  {key}: {old!r}, with these options {new!r}\n" for key, old, new in changes(plain, other)]:
        raise UsageError(
            f"{shlex.join(extra)} makes other runs than the cells wait for, and no cell would count them:\n"
            f"{''.join(changed[:2])}  Leave it out, or run fit and test by hand."
        )


def submissions(wanted: Sequence[MissingRun], extra: Sequence[str]) -> list[list[str]]:
    """Options of `submit` that hand what is missing to SLURM: for each experiment an array over its seeds."""
    seeds: dict[str, list[int]] = {}
    first: Mapping[str, MissingRun] = {entry.experiment.key: entry for entry in reversed(wanted)}
    for entry in wanted:
        seeds.setdefault(entry.experiment.key, []).append(entry.seed)
    return [
        [
            *first[key].options(),
            *("--array", f"seeds={','.join(map(str, chosen))}", "--test", *extra),
        ]
        for key, chosen in seeds.items()
    ]
