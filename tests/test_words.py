"""The words: documentation, help, docstrings, comments and messages use the field's terms, one for each thing."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: What is not said, and what is said instead.
GLOSSARY = {
    r"pictures?": "image; a plotted one: figure",
    r"joints?": "keypoint",
    r"anew": "again, or name what is new",
    r"seal(s|ed|ing)?": "checksum",
    r"books?": "table spec",
    r"headlines?": "primary metric",
    r"census": "dataset summary",
    r"people's boxes|boxes of people": "person boxes",
    r"learn(s|t|ed|ing)? by heart|learnt by heart": "overfit",
    r"go(es|ing)? on with|gone on with|go(es)? on from": "resume",
    r"lies? (over|below|in|beside|behind|at|there)|lay over|laid over": "overrides, is in, is beside",
    r"whereof|thereof|wherein|whence": "of which",
    r"the like": "name it",
    r"that which": "what",
    r"of them alone|alone\b(?= that)": "only",
    r"enlarge(s|d)?": "upscale",
    r"(?<!ground )(?<!ground-)truth": "ground truth",
    r"where .* cannot be(?=[.:;,])|that cannot be(?=[.:;,])": "if an argument is invalid",
    r"hand(s|ed)? .* to SLURM": "submit",
    r"inference form": "deployed (fused) model",
}
FORBIDDEN = re.compile(r"(?<![\w`/.-])(" + "|".join(GLOSSARY) + r")(?![\w`/-])", re.IGNORECASE)
#: The line of an argument that takes the argument's name as its subject instead of being a sentence by itself.
FRAGMENT = re.compile(
    r"^\s+[\w*]+(?: \([^)]*\))?: (Of|That|Which|And|Behind|Whose|Without|Below|Above|By|As)\b", re.MULTILINE
)

PYTHON = sorted([*(ROOT / "sis_lightning").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("results/*.md"), *ROOT.glob("results/benchmarks/*.md")])
YAML = sorted(
    path for folder in ("tasks", "datamodules", "configs", "results") for path in (ROOT / folder).rglob("*.yaml")
)


def without_code(text: str) -> str:
    """Prose without code in backticks, fenced code and option names."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"[ \n]+", " ", re.sub(r"`[^`\n]*`|--[\w.-]+", "", text))


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, comment and sentence in a string of a Python file."""
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def found_in(pieces: Iterator[tuple[int, str]], path: Path) -> list[str]:
    found = []
    for line, text in pieces:
        for match in FORBIDDEN.finditer(without_code(text)):
            wanted = next(say for word, say in GLOSSARY.items() if re.fullmatch(word, match.group(1), re.IGNORECASE))
            found.append(f"{path.relative_to(ROOT)}:{line}: '{match.group(1)}' (say: {wanted})")
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [path for path in PYTHON if path != Path(__file__)], ids=name)
def test_code_speaks_the_language_of_the_field(path):
    assert not found_in(prose_of(path), path)


@pytest.mark.parametrize("path", [*DOCUMENTS, *YAML], ids=name)
def test_documents_speak_the_language_of_the_field(path):
    text = re.sub(
        r"```.*?```", lambda code: "\n" * code.group(0).count("\n"), path.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert not found_in(iter(enumerate(text.splitlines(), start=1)), path)


@pytest.mark.parametrize("path", sorted((ROOT / "sis_lightning").rglob("*.py")), ids=name)
def test_every_argument_line_stands_by_itself(path):
    fragments = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True) or ""
            fragments += [match.group(0).strip() for match in FRAGMENT.finditer(text)]
    assert not fragments


def test_help_speaks_the_language_of_the_field(command):
    from sis_lightning.commands.main import COMMANDS

    for words in [["--help"], *([name, "--help"] for name in COMMANDS)]:
        result = command(*words)
        assert result.code == 0, result.err
        match = FORBIDDEN.search(without_code(result.out))
        assert match is None, f"{words}: {match}"
