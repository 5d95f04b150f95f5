"""A folder of results: its specs, its records and what the code counts; all that `sis-lightning tables` does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from sis_lightning.config_files import PACKAGED
from sis_lightning.errors import UsageError
from sis_lightning.slurm import jobs as slurm
from sis_lightning.tables import plan
from sis_lightning.tables.cells import Evidence, FilledTable, Models, fill, read_records
from sis_lightning.tables.render import render, stale_figures, write_tables
from sis_lightning.tables.spec import TableSpec, spec_files, read_specs


class Results:
    """A folder with specs (`*.yaml`), `records/`, `models.json`, and what is generated of them.

    Args:
        folder: The packaged specs stand in where it has none.

    Raises:
        UsageError, DataError: For specs and files that cannot be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.records, self.kept = folder, folder / "records", folder / "models.json"

    @cached_property
    def shipped(self) -> TableSpec:
        """The specs, with the built-in operators alone."""
        return read_specs(spec_files(self.folder))

    @property
    def models(self) -> Models:
        """What the code counted last; where nothing was, what it had counted for this release."""
        packaged = PACKAGED / "results" / "models.json"
        return Models.read(self.kept if self.kept.is_file() or any(self.folder.glob("*.yaml")) else packaged)

    @property
    def spec(self) -> TableSpec:
        """The specs, with a row for every operator that the code knew when it counted."""
        return self.shipped.with_operators(self.models.operators)

    @property
    def evidence(self) -> list[Evidence]:
        """All records."""
        return read_records(self.records)

    def filled(self, running: bool = False) -> list[FilledTable]:
        """All tables; with cells that a fit here is busy with, where asked for."""
        spec, models = self.spec, self.models
        return fill(spec, self.evidence, models, plan.busy(spec, models) if running else ())

    def count(self) -> list[str]:
        """Counts anew what the code may have changed; returns in what it differs from what was kept."""
        before = self.models
        now = plan.count(self.shipped, before)
        if now != before:
            now.write(self.kept)
        return plan.differences(before, now)

    def missing(
        self, tables: Sequence[str], rows: Sequence[str], seeds: Sequence[int] | None, roots: Mapping[str, str]
    ) -> list[plan.MissingRun]:
        """The runs that cells wait for, of the named tables and rows; counts what it needs first.

        Raises:
            UsageError: For a table, row or run that there is not.
        """
        from sis_lightning.operators import list_operators

        spec = self.shipped.with_operators(list_operators()).chosen(tables, rows)
        kept = self.models
        if kept.by_key and kept.code != plan.code_digest() and (tables or rows):
            models = plan.count(spec, kept)  # a few rows of changed code need not wait for all the others
        else:
            self.count()
            models = self.models
        runs = {experiment.run.name for experiment in spec.experiments().values()}
        for name in roots:
            if name not in runs:
                raise UsageError(f"--roots: no run is called '{name}' here: {', '.join(sorted(runs))}")
        return plan.missing(spec, self.evidence, models, seeds, roots)

    def add(self, paths: Sequence[Path]) -> list[Path]:
        """Takes records in; returns the new ones."""
        return plan.add(paths, self.records)

    def render(self) -> list[Path]:
        """Writes the tables in all forms."""
        return write_tables(self.spec, self.filled(running=True), self.folder)

    def check(self) -> list[str]:
        """What is wrong with the folder: nothing, where everything in it follows from specs, records and code.

        Raises:
            DataError: For a record that was edited.
        """
        before = self.models
        now = plan.count(self.shipped, before)
        problems = [f"models.json: {text}" for text in plan.differences(before, now)]
        if problems:
            return [*problems, "models.json is stale: sis-lightning tables count, then tables render"]
        # What was rendered while a fit ran says so; what was rendered before it began does not.
        still, busy = self.filled(), self.filled(running=True)
        before_fits = render(self.spec, still, self.folder)
        for path, text in render(self.spec, busy, self.folder).items():
            if not path.is_file():
                problems.append(f"{path} is missing: sis-lightning tables render")
            elif path.read_text(encoding="utf-8") not in (text, before_fits[path]):
                problems.append(f"{path} is not what specs and records give: sis-lightning tables render")
        stale = stale_figures(still, self.folder)
        return [*problems, *(f"{path} was drawn of other cells: sis-lightning tables figures" for path in stale)]

    def draw(self, names: Sequence[str], runs: Sequence[Path]) -> list[Path]:
        """Draws figures into `figures/`; all of them, and what can no longer be drawn goes."""
        from sis_lightning.tables.figures import draw

        folder = self.folder / "figures"
        written = draw(names, self.filled(), self.evidence, folder, runs)
        if not names:
            kept = {*written, *(folder.glob("activation_maps.*") if not runs else ())}
            own = re.compile(r"((accuracy|sizes|curves)_table_.+|receptive_fields|activation_maps)\.(png|svg)")
            for path in folder.glob("*.*"):
                if path not in kept and own.fullmatch(path.name):
                    path.unlink()
        return written


def seeds_of(text: str | None) -> list[int] | None:
    """`3` is the first three seeds, `0,5` these two, `0..4` these five, `0,` seed 0 alone; None stays None.

    Raises:
        UsageError: For anything else.
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
    """Folders by the names of runs.

    Raises:
        UsageError: For anything but `RUN=DIR`.
    """
    pairs = [text.partition("=") for text in texts]
    for text, (name, _, folder) in zip(texts, pairs, strict=True):
        if not name or not folder:
            raise UsageError(f"--roots is '{text}', must be RUN=DIR, such as det_coco=/data/coco")
    return {name: folder for name, _, folder in pairs}


def to_text(wanted: Sequence[plan.MissingRun]) -> str:
    """What is missing, for people: a line of what it is, and the command below it."""
    if not wanted:
        return "nothing is missing\n"
    lines = [f"{len(wanted)} run(s) are missing:"]
    for entry in wanted:
        where = f"table {entry.table}, {entry.row}, {entry.experiment.run.name} on {entry.folder.parent.name}"
        lines += [f"{where}, seed {entry.seed}: {entry.progress}", f"  {entry.command}"]
    return "\n".join(lines) + "\n"
