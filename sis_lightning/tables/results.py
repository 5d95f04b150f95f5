"""A folder of results: its table specs, its records and the counts; all that `sis-lightning tables` does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from sis_lightning.config_files import PACKAGED
from sis_lightning.errors import UsageError
from sis_lightning.run.recipe import effects_of_path
from sis_lightning.slurm import jobs as slurm
from sis_lightning.tables import paper, plan
from sis_lightning.tables.audit import unknown_commits, unsigned
from sis_lightning.tables.cells import FilledTable, fill
from sis_lightning.tables.judge import Evidence, contradictions, read_records
from sis_lightning.tables.models import Models
from sis_lightning.tables.render import render, stale_figures, write_tables
from sis_lightning.tables.spec import TableSpec, read_specs, spec_files


class Results:
    """A folder with table specs (`*.yaml`), `records/`, `models.json`, and all that is generated from them.

    Args:
        folder: The folder; the packaged table specs are used if it has none.

    Attributes:
        folder: The folder.
        records: Its folder of records.
        counts: Path of `models.json`.

    Raises:
        UsageError: If a table spec is invalid; when it is first read.
        DataError: If a record or `models.json` is damaged; when it is first read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.records, self.counts = folder, folder / "records", folder / "models.json"

    @cached_property
    def shipped(self) -> TableSpec:
        """The table specs, with rows of the built-in operators only."""
        return read_specs(spec_files(self.folder))

    @property
    def models(self) -> Models:
        """The counts of the folder; if nothing has been counted, those that come with this release."""
        packaged = PACKAGED / "results" / "models.json"
        return Models.read(self.counts if self.counts.is_file() or any(self.folder.glob("*.yaml")) else packaged)

    @property
    def spec(self) -> TableSpec:
        """The table specs, with a row for every operator that was registered when the folder was counted."""
        return self.shipped.with_operators(self.models.operators)

    @property
    def evidence(self) -> list[Evidence]:
        """All records."""
        return read_records(self.records, self.models.declared)

    def filled(self, running: bool = False) -> list[FilledTable]:
        """All tables, filled.

        Args:
            running: Whether cells of experiments that are being trained here have the state `running`.
        """
        spec, models = self.spec, self.models
        return fill(spec, self.evidence, models, plan.running(spec, models) if running else ())

    def count(self) -> list[str]:
        """Counts again what may have changed; returns the differences from the previous counts."""
        before = self.models
        now = plan.count(self.shipped, before)
        if now != before:
            now.write(self.counts)
        return plan.differences(before, now)

    def missing(
        self, tables: Sequence[str], rows: Sequence[str], seeds: Sequence[int] | None, roots: Mapping[str, str]
    ) -> list[plan.MissingRun]:
        """The runs that cells need; counts what it needs first.

        Args:
            tables: Tables to look at; empty for all.
            rows: Rows to look at, by label, backbone or operator; empty for all.
            seeds: Seeds, instead of those of the table spec.
            roots: Folders with the data of runs, by the names of the runs.

        Raises:
            UsageError: If there is no such table, row or run.
        """
        from sis_lightning.operators import list_operators

        spec = self.shipped.with_operators(list_operators()).selected(tables, rows)
        known = self.models
        if known.by_key and known.code != plan.code_digest() and (tables or rows):
            models = plan.count(spec, known)  # a few rows need not wait for all the others
        else:
            self.count()
            models = self.models
        _require_runs(roots, spec)
        return plan.missing(spec, self.evidence, models, seeds, roots)

    def add(self, paths: Sequence[Path]) -> list[Path]:
        """Adds records; returns the new ones."""
        return plan.add(paths, self.records)

    def render(self) -> list[Path]:
        """Writes the tables in all forms; returns the files."""
        return write_tables(self.spec, self.filled(running=True), self.folder)

    def check(self, key: Path | None = None) -> list[str]:
        """Verifies that everything generated follows from table specs, records and code, as far as files can tell.

        Parameters and MACs are counted again, hashes are computed from the configurations, tables of the paper are
        compared with the paper, and commits are looked up in the history. Whether a record is true, `verify` measures.

        Args:
            key: File with a public key of minisign with which every record must be signed; None asks for no signatures.

        Returns:
            The problems; empty if there are none.

        Raises:
            UsageError: If minisign or the key is missing.
            DataError: If a record or `models.json` does not match its checksum.
        """
        # All is counted again: models.json may hold anything.
        problems = [
            f"models.json: {text}" for text in plan.differences(self.models, plan.count(self.shipped, Models.none()))
        ]
        if problems:
            return [*problems, "models.json is outdated: run sis-lightning tables count, then tables render"]
        for table, texts in paper.deviations(self.shipped).items():
            problems += [f"table {table} is not the paper's: {text}" for text in texts[:3]]
        evidence = self.evidence
        for piece in evidence:
            problems += [f"{piece.name}: {text}" for text in contradictions(piece.record)[:1]]
            again = Evidence.of(piece.name, piece.record)
            classes = [str(piece.record.config.get(part, {}).get("class_path")) for part in ("model", "data")]
            # What the options of a user's class do is not known where it cannot be imported.
            if all(map(effects_of_path, classes)) and (piece.record.recipe_hash, piece.record.config_hash) != (
                again.recipe,
                again.whole,
            ):
                problems.append(f"{piece.name}: its hashes are not those of its configuration")
        problems += unknown_commits(evidence)
        problems += unsigned(self.records, key) if key else []
        # Tables rendered during a training call its cells running; both forms are right.
        finished, running = self.filled(), self.filled(running=True)
        without_running = render(self.spec, finished, self.folder)
        for path, text in render(self.spec, running, self.folder).items():
            if not path.is_file():
                problems.append(f"{path} is missing: run sis-lightning tables render")
            elif path.read_text(encoding="utf-8") not in (text, without_running[path]):
                problems.append(f"{path} does not match specs and records: run sis-lightning tables render")
        stale = stale_figures(finished, self.folder)
        return [
            *problems,
            *(f"{path} was plotted from other cells: run sis-lightning tables figures" for path in stale),
        ]

    def verify(
        self,
        tables: Sequence[str],
        rows: Sequence[str],
        roots: Mapping[str, str],
        *,
        sample: int | None = None,
        retrain: int = 0,
        tolerance: float | None = None,
    ) -> bool:
        """Measures the records of cells again, and prints what comes out; see `sis_lightning.tables.verify`.

        Args:
            tables: Tables to look at; empty for all.
            rows: Rows to look at, by label, backbone or operator; empty for all.
            roots: Folders with the data of runs, by the names of the runs.
            sample: Number of records to measure again; None for all.
            retrain: Number of records to train again.
            tolerance: Largest difference of a second training; None: as another seed.

        Returns:
            Whether nothing contradicts a record.

        Raises:
            UsageError: If there is no such table or row.
            DataError: If a command fails.
        """
        from sis_lightning.tables.verify import recorded, verify

        models, evidence = self.models, self.evidence
        filled = fill(self.spec.selected(tables, rows), evidence, models)
        entries = recorded(filled, evidence, models)
        _require_runs(roots, self.spec.selected(tables, rows))
        if not entries:
            print("no record counts in these tables, so there is nothing to verify")
        return verify(entries, roots, sample=sample, retrain=retrain, tolerance=tolerance)

    def draw(self, names: Sequence[str], runs: Sequence[Path]) -> list[Path]:
        """Plots figures into `figures/`. If all are plotted, those that no longer exist are removed.

        The pages that show them are written again if they are there.

        Args:
            names: Names of figures; empty for all.
            runs: Directories of classification runs, for `activation-maps`.

        Returns:
            The files written.
        """
        from sis_lightning.tables.draw import draw

        folder = self.folder / "figures"
        written = draw(names, self.filled(), self.evidence, folder, runs)
        if not names:
            kept = {*written, *(folder.glob("activation_maps.*") if not runs else ())}
            own = re.compile(r"((accuracy|sizes|curves)_table_.+|receptive_fields|activation_maps)\.(png|svg)")
            for path in folder.glob("*.*"):
                if path not in kept and own.fullmatch(path.name):
                    path.unlink()
        return [*written, *(self.render() if (self.folder / "TABLES.md").is_file() else [])]


def _require_runs(roots: Mapping[str, str], spec: TableSpec) -> None:
    runs = {experiment.run.name for experiment in spec.experiments().values()}
    for name in roots:
        if name not in runs:
            raise UsageError(f"--roots: no run is called '{name}' here: {', '.join(sorted(runs))}")


def seeds_of(text: str | None) -> list[int] | None:
    """Parses seeds: `3` means the seeds 0, 1 and 2; `0,5` and `0..4` name seeds; `0,` is seed 0 alone.

    Args:
        text: What was typed; None stays None.

    Raises:
        UsageError: If the text has another form.
    """
    if text is None:
        return None
    if re.fullmatch(r"[1-9]\d*", text):
        return list(range(int(text)))
    try:
        return slurm.seeds_of(f"seeds={'' if text == '0' else text.removesuffix(',')}")
    except UsageError:
        raise UsageError(f"--seeds is '{text}', must be how many (3) or which (0,1,4 or 0..4; 0, is seed 0)") from None


def roots_of(texts: Sequence[str]) -> dict[str, str]:
    """Parses texts `RUN=DIR` into folders by the names of runs.

    Raises:
        UsageError: If a text has another form.
    """
    pairs = [text.partition("=") for text in texts]
    for text, (name, _, folder) in zip(texts, pairs, strict=True):
        if not name or not folder:
            raise UsageError(f"--roots is '{text}', must be RUN=DIR, such as det_coco=/data/coco")
    return {name: folder for name, _, folder in pairs}


def to_text(missing: Sequence[plan.MissingRun]) -> str:
    """Missing runs, each with its command on a line of its own."""
    if not missing:
        return "nothing is missing\n"
    lines = [f"{len(missing)} run(s) are missing:"]
    for entry in missing:
        what = f"weights for {entry.row}" if entry.trained_only else entry.row
        where = f"table {entry.table}, {what}, {entry.experiment.run.name} on {entry.folder.parent.name}"
        lines += [f"{where}, seed {entry.seed}: {entry.progress}", f"  {entry.command}"]
        if entry.needs:
            lines.append(f"  after {entry.needs}, whose weights it starts from")
    return "\n".join(lines) + "\n"
