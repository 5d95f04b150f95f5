"""The version is stated once, where the build reads it."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path

import sis_lightning

ROOT = Path(__file__).parents[1]


def test_the_build_reads_the_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    path = ROOT / project["tool"]["hatch"]["version"]["path"]
    assert runpy.run_path(str(path))["__version__"] == sis_lightning.__version__
