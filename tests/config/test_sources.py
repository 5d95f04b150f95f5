"""results/SOURCES.md lists every number of the recipes, as the YAML has it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sis_lightning.config.compose import compose
from sis_lightning.config_files import config_names

TEXT = (Path(__file__).parents[2] / "results" / "SOURCES.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
#: Numbers that change no result, and the backbone's, which are in files of their own.
NOT_OF_THE_RECIPE = ("seed_everything", "trainer.log_every_n_steps", "data.num_workers", "model.backbone.")


def numbers(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from numbers(item, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        if value and all(isinstance(item, (int, float)) for item in value):
            yield key, value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def listed(task: str) -> dict[str, Any]:
    rows = re.findall(r"^\| ([\w.]+) \| (.+?) \| (.+?) \| (.+?) \|$", SECTIONS[task], re.MULTILINE)
    rows = [row for row in rows if row[0] != "option"]
    assert all(source.strip() and words.strip() for _, _, source, words in rows)
    return {key: yaml.safe_load(value) for key, value, _, _ in rows}


@pytest.mark.parametrize("task", config_names("tasks"))
def test_every_number_of_a_recipe_has_its_source(task):
    recipe = {
        key: value for key, value in numbers(compose([f"tasks/{task}.yaml"])) if not key.startswith(NOT_OF_THE_RECIPE)
    }
    known = {**(listed("det_coco") if task == "det_voc" else {}), **listed(task)}
    flags = {key: value for key, value in known.items() if isinstance(value, bool)}
    stated = {key: value for key, value in known.items() if key in recipe}
    assert stated == recipe
    if task != "det_voc":
        assert set(known) == set(recipe) | set(flags)
