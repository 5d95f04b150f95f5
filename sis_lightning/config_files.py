"""The project's YAML files: where they are found, and how one of them is read. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sis_lightning.errors import UsageError, nearest

_PACKAGE = Path(__file__).parent
# In a wheel the YAML lies beside the code, in a clone beside the package.
PACKAGED = _PACKAGE / "yaml" if (_PACKAGE / "yaml").is_dir() else _PACKAGE.parent


def config_roots() -> Iterator[Path]:
    """Where YAML is looked for: the current directory, each of `$SIS_CONFIG_PATH`, the packaged files."""
    yield Path()
    for entry in os.environ.get("SIS_CONFIG_PATH", "").split(os.pathsep):
        if entry:
            yield Path(entry)
    yield PACKAGED


def config_names(folder: str) -> list[str]:
    """The names of all YAML files in a folder (such as `configs/backbones`), over all roots."""
    return sorted({path.stem for root in config_roots() for path in (root / folder).glob("*.yaml")})


def find_config(name: str, folder: str = "") -> Path:
    """The file that `name` means.

    Args:
        name: As the user typed it: a path, with or without `.yaml`, or a bare name of a file in `folder`.
        folder: Where bare names live, such as `configs/backbones`.

    Returns:
        The first that exists: as typed, then below each of `$SIS_CONFIG_PATH`, then the packaged copy.

    Raises:
        UsageError: Where there is none; the message lists the nearest names.
    """
    spellings = [name] if name.endswith((".yaml", ".yml", ".json")) else [f"{name}.yaml", name]
    folders = ["", folder] if folder else [""]
    for root in config_roots():
        for place in folders:
            for spelling in spellings:
                path = root / place / spelling
                if path.is_file():
                    return path
    parent = str(Path(name).parent)
    searched = folder or ("tasks" if parent == "." else parent)
    known = config_names(searched) or config_names("tasks")
    raise UsageError(f"no configuration file '{name}': {nearest(Path(name).stem, known)}\n  in {searched}/")


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads one YAML file, a mapping.

    Raises:
        UsageError: If the file is not UTF-8 text, not valid YAML (with line and column), not a mapping, or has a key
            twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{path}{where}: not valid YAML: {problem}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a configuration is a mapping of keys, this is a {type(content).__name__}")
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, and reads 1e-3 as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML follows, wants a dot in a float: without this 1e-3 is a string.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
