"""Names of operators for help texts, found without importing torch.

A module of a user's operators cannot be imported for a help text: it imports torch, which takes seconds. Its source is
parsed instead, and names are taken from the calls `register_operator("name")` in it.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from pathlib import Path


def listed_operators() -> list[str]:
    """Names of the package's operators, then of those of users.

    Returns:
        The names; for a module whose source is not found or registers no constant name, a hint at the module instead.
    """
    folder = Path(__file__).parents[1] / "operators"
    names = [name for path in sorted(folder.glob("*.py")) for name in _registered(path.read_text(encoding="utf-8"))]
    for module in _modules():
        source = _source(module)
        names += (_registered(source) if source else []) or [f"(those of {module})"]
    return list(dict.fromkeys(names))


def _modules() -> Iterator[str]:
    yield from os.environ.get("SIS_OPERATORS", "").split()
    for entry in entry_points(group="sis_lightning.operators"):
        yield entry.module


def _registered(source: str) -> list[str]:
    """Names that a module registers, in its order."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "register_operator":
            values = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "name")]
            names += [str(value.value) for value in values if isinstance(value, ast.Constant)]
    return names


def _source(module: str) -> str | None:
    """The source of a module, found without importing it or the packages that it is in."""
    path: list[str] | None = [str(Path.cwd()), *sys.path]
    spec = None
    for part in module.split("."):
        spec = PathFinder.find_spec(part, path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        return Path(spec.origin).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
