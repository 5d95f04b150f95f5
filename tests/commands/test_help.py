"""Help texts: complete, quick to import, with examples that parse, and with the operators of users."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sis_lightning.commands import submit, tables
from sis_lightning.commands.main import COMMANDS
from sis_lightning.config.compose import resolve

RUN_COMMANDS = ("fit", "validate", "test", "predict")


def run_python(program: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_help_imports_nothing_heavy(tmp_path):
    lines = ["--help", "--version", "fit --config nothing", *(f"{name} --help" for name in COMMANDS)]
    program = (
        "import sys; from sis_lightning.commands.main import main\n"
        f"for line in {lines!r}: main(line.split())\n"
        "heavy = {'torch', 'lightning', 'numpy', 'matplotlib', 'rich', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    out = run_python(program, tmp_path)
    assert "usage: sis-lightning COMMAND" in out
    assert "no configuration file 'nothing'" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(command, name):
    overview = command("--help").out
    assert f"  {name:<12}{COMMANDS[name]}" in overview
    result = command(name, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: sis-lightning {name}")
    assert result.err == ""
    assert re.search(rf"examples:\n(  # .*\n)?  sis-lightning {name}", result.out)
    assert command(name, "-h").out == result.out


def examples(text: str) -> list[list[str]]:
    return [
        shlex.split(line)[1:] for line in re.findall(r"^  (sis-lightning .*)$", text.partition("examples:")[2], re.M)
    ]


@pytest.mark.parametrize("name", RUN_COMMANDS)
def test_examples_of_run_commands_name_files_that_exist(command, name):
    for words in examples(command(name, "--help").out):
        if "runs/seg_voc/sis50-26w4s-basic/seed0/config.yaml" not in words:  # an example of a run that is not here
            layers, _ = resolve(words[1:])
            assert layers["model"]["class_path"].endswith("Task")


def test_examples_of_other_commands_parse(command):
    for words in examples(command("submit", "--help").out):
        assert submit.submit_parser().parse_known_args(words[1:])
    for words in examples(command("tables", "--help").out):
        own = words[1 : words.index("--")] if "--" in words else words[1:]
        assert tables.tables_parser().parse_args(own)


def test_options_in_short_help_exist_in_the_full_list(command):
    full = command("fit", "--config", "tasks/kpt_coco.yaml", "--help-all").out
    for name in RUN_COMMANDS:
        for option in set(re.findall(r"^  (?:-c FILE, )?(--[\w.]+)", command(name, "--help").out, re.M)):
            part, _, key = option.removeprefix("--").partition(".")
            leaf = option if part not in ("model", "data") or not key else key.rpartition(".")[2]
            # steps and operator are fields of the backbone; the Trainer has an option of its own for each key.
            assert leaf in full or leaf == "--debug", option


def test_help_lists_operators_of_users_without_importing_them(tmp_path):
    (tmp_path / "plain.py").write_text(
        "raise RuntimeError('imported')\n@register_operator('plain')\nclass Plain: pass\n"
        "@operators.register_operator(name='named')\nclass Named: pass\n"
    )
    (tmp_path / "package" / "inner").mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "package" / "inner" / "__init__.py").write_text("")
    (tmp_path / "package" / "inner" / "deep.py").write_text("@register_operator('deep')\nclass Deep: pass\n")
    (tmp_path / "computed.py").write_text("NAME = 'x'\n@register_operator(NAME)\nclass X: pass\n")
    program = "from sis_lightning.commands.main import main; main(['fit', '--help'])"
    out = " ".join(run_python(program, tmp_path, SIS_OPERATORS="plain package.inner.deep computed gone").split())
    assert (
        "conv, basic, interactive1, interactive2, recurrent1, recurrent2, plain, named, deep, (those of computed), "
        "(those of gone)" in out
    )


def test_operators_of_installed_packages_are_listed(monkeypatch, tmp_path):
    from sis_lightning.commands import operator_listing

    class Entry:
        module = "installed_operators"

    (tmp_path / "installed_operators.py").write_text("@register_operator('installed')\nclass I: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("SIS_OPERATORS", raising=False)
    monkeypatch.setattr(operator_listing, "entry_points", lambda group: [Entry] if "operators" in group else [])
    assert operator_listing.listed_operators()[-1] == "installed"
