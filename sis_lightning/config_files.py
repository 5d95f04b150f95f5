"""The YAML files of the project: where they are searched, and how they are read. Imports nothing slow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sis_lightning.errors import UsageError, nearest

_PACKAGE = Path(__file__).parent
# In a wheel the YAML files are inside the package, in a clone they are beside it.
PACKAGED = _PACKAGE / "yaml" if (_PACKAGE / "yaml").is_dir() else _PACKAGE.parent

#: Largest number of values that the aliases of a configuration file may add to it.
_LARGEST_EXPANSION = 10_000


def config_roots() -> Iterator[Path]:
    """Yields the folders that are searched: the current one, those of `$SIS_CONFIG_PATH`, and that of the package."""
    yield Path()
    for entry in os.environ.get("SIS_CONFIG_PATH", "").split(os.pathsep):
        if entry:
            yield Path(entry)
    yield PACKAGED


def config_names(folder: str) -> list[str]:
    """Returns the names of all YAML files in a folder such as `configs/backbones`, below all searched folders."""
    return sorted({path.stem for root in config_roots() for path in (root / folder).glob("*.yaml")})


def find_config(name: str, folder: str = "") -> Path:
    """Finds the file that a name stands for.

    Args:
        name: A path with or without `.yaml`, or the name of a file in `folder`.
        folder: Folder in which names are searched, such as `configs/backbones`.

    Returns:
        The first file that exists: in the current directory, below the folders of `$SIS_CONFIG_PATH`, in the package.

    Raises:
        UsageError: If there is none; the message lists the nearest names.
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
    """Reads a YAML file that holds a mapping.

    Raises:
        UsageError: If the file is not UTF-8 text, not valid YAML (with line and column), not a mapping, has a key
            twice, or is too large when its aliases are replaced by what they stand for.
    """
    try:
        loader = _UniqueKeyLoader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            _refuse_expansion(node, path)
            content = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise UsageError(f"{path}: not a configuration: its values are nested too deeply") from None
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
        raise UsageError(f"{path}: a configuration must be a mapping of keys, not a {type(content).__name__}")
    return content


def _refuse_expansion(root: yaml.Node | None, path: Path) -> None:
    """Raises UsageError if aliases (`*name`) make a document much larger than its file, without end at worst.

    Nine lists, each with nine aliases of the one before, are 400 million values, which would be merged one by one.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        key = id(node)
        if key not in sizes:
            if key in open_nodes:
                line = node.start_mark.line + 1
                raise UsageError(f"{path}, line {line}: not a configuration: a value contains itself by an alias")
            open_nodes.add(key)
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            children = [child for part in parts for child in (part if isinstance(part, tuple) else [part])]
            sizes[key] = 1 + sum(map(size, children))
        return sizes[key]

    if root is not None and (added := size(root) - len(sizes)) > _LARGEST_EXPANSION:
        raise UsageError(
            f"{path}: its aliases (*name) stand for {added:,} further values, of at most {_LARGEST_EXPANSION:,}: "
            "write out what is meant"
        )


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys, and reads 1e-3 as a number."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not when it is constructed: by then, keys of merged mappings (`<<: *name`) may be among its own.
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return node


# PyYAML follows YAML 1.1, in which a float needs a dot: 1e-3 would be a string.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
