"""Finds the project's YAML files from any directory and merges them, without importing torch.

A run is described by layers: `--config tasks/seg_voc.yaml --config configs/demo.yaml`, then the options of the command
line. Later files override earlier ones, and command-line options override all files. A layer may

- name a backbone, a data set or a trainer by its file instead of writing it out: `backbone: sis50` inside a model's
  `init_args` stands for all of `configs/backbones/sis50.yaml`, `data: voc_segmentation` for
  `datamodules/voc_segmentation.yaml`, `trainer: gpu` for `configs/trainers/gpu.yaml`. A name replaces whatever earlier
  layers said about it, so that nothing of one backbone is left in another;
- hold options for some runs only: below `for:`, keys are class names, and the options under the class of the run's
  model or data override the rest of that layer.

An object that is given another class loses the arguments of its old class, whether a file or an option gives it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from sis_lightning.config_files import PACKAGED, find_config, read_yaml
from sis_lightning.errors import UsageError

# The folders of the files that a key may name.
REFERENCES = {"backbone": "configs/backbones", "data": "datamodules", "trainer": "configs/trainers"}

Layer = dict[str, Any]


def load_layer(path: Path) -> Layer:
    """Reads one YAML file, nests its dotted keys, and inserts the files that it names.

    Args:
        path: The file.

    Returns:
        Nested plain data.

    Raises:
        UsageError: If the YAML is not valid (with line and column), a key is given twice, or an object is both named
            by a file and given further keys (`backbone: sis50` and `backbone.depth: 101`).
    """
    layer: Layer = {}
    for key, value in read_yaml(path).items():
        _put(layer, str(key).split("."), _nested(value, path), path)
    return layer


def merge(below: Layer, above: Layer) -> Layer:
    """Merges two layers: mappings key by key, anything else as a whole.

    If `above` gives an object another class, or names another file for it, nothing of the object in `below` is kept:
    the arguments of one class mean nothing to another.

    Args:
        below: The earlier layer.
        above: The later layer, which overrides it.

    Returns:
        A new layer.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not value.get(_WHOLE):
            merged[key] = merge(old, value) if _same_class(old, value.get("class_path")) else value
        else:
            merged[key] = value
    return merged


def compose(paths: list[str], named: Layer | None = None) -> Layer:
    """Merges `configs/defaults.yaml` and the named files, the last of which overrides all others.

    Args:
        paths: The files, as the user typed them.
        named: Contents of the files that `--data NAME` and `--trainer NAME` name. The data set replaces that of the
            first file, so that overlays apply to it too; the trainer overrides all files.

    Returns:
        Nested plain data without file names, dotted keys or `for:` sections.

    Raises:
        UsageError: If a file does not exist or is invalid, as `find_config` and `load_layer` say it.
    """
    composed: Layer = {}
    files = [PACKAGED / "configs" / "defaults.yaml", *map(find_config, paths)]
    layers = [(path, load_layer(path)) for path in files]
    tasks = list(dict.fromkeys(path for path, layer in layers if len(list(_classes(layer))) == 2))
    if len(tasks) > 1:
        raise UsageError(
            f"{tasks[0]} and {tasks[1]} are two tasks, each with a model and data, but a run has one: leave one out.\n"
            "  Another data set for a task: --data NAME, with a file in datamodules/."
        )
    named = named or {}
    # Overlays apply to another data set; a trainer is for this run alone, whatever the files say.
    layers.insert(2, (PACKAGED, {key: {**value, _WHOLE: True} for key, value in named.items() if key != "trainer"}))
    layers.append((PACKAGED, {key: value for key, value in named.items() if key == "trainer"}))
    for path, layer in layers:
        sections = layer.pop("for", {})
        if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
            raise UsageError(f"{path}: 'for:' must map class names to the options for runs of that class")
        composed = merge(composed, layer)
        for class_name in _classes(composed):
            if class_name in sections:
                composed = merge(composed, sections[class_name])
    plain: Layer = _without_marks(composed)
    return plain


def resolve(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Merges the files that arguments name (`--config`, `--data NAME`, `--trainer NAME`, `--model.backbone NAME`).

    Args:
        arguments: Arguments as on the command line.

    Returns:
        The merged files, and the remaining options, ready for `Run`. An option that gives an object another class drops
        the arguments of the old class, as a file does.

    Raises:
        UsageError: If a file does not exist or is invalid.
    """
    files: list[str] = []
    options: list[str] = []
    named: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.partition("=")
        key = "--model.backbone" if key == "--model.init_args.backbone" else key
        if key in ("-c", "--config", "--data", "--trainer", "--model.backbone"):
            if not equals:
                value = next(rest, "")
            if not value or value.startswith("--"):
                raise UsageError(f"{key} needs a file or a name after it")
        if key in ("-c", "--config"):
            files.append(value)
        elif key in ("--data", "--trainer") and not value.lstrip().startswith("{") and "." not in value:
            named[key[2:]] = load_named(key[2:], value)
        elif key == "--model.backbone" and not value.lstrip().startswith("{"):
            options += [key, json.dumps(load_named("backbone", value))]
        else:
            options += [f"{key}={value}"] if key in ("--data", "--trainer", "--model.backbone") else [argument]
    composed = compose(files, named)
    options = _drop_replaced_classes(composed, options)
    if files and "task" not in composed:
        composed["task"] = files[0].rpartition("/")[2].partition(".")[0]
    return composed, options


def load_named(kind: str, name: str) -> Layer:
    """The content of the file that `name` means for a key of `REFERENCES`, such as `backbone`."""
    return load_layer(find_config(name, REFERENCES[kind]))


def _same_class(old: Mapping[str, Any], class_path: Any) -> bool:
    """Whether a class path names the object's class; true if None."""
    known = old.get("class_path")
    if class_path is None or known is None or class_path == known:
        return class_path is None or class_path == known
    return "." not in class_path and str(known).rpartition(".")[2] == class_path


def _drop_replaced_classes(composed: Layer, options: list[str]) -> list[str]:
    """Removes arguments of classes that a later option replaces.

    Args:
        composed: The merged files, changed in place.
        options: `--KEY=VALUE` or `--KEY VALUE`, in their order.

    Returns:
        The options without those that set arguments of a class that a later one replaces.
    """
    kept: list[str] = []
    chosen: dict[str, dict[str, Any]] = {}
    for index, option in enumerate(options):
        key, equals, value = option.partition("=")
        kept.append(option)
        if not key.startswith("--"):
            continue
        if not equals:
            value = options[index + 1] if index + 1 < len(options) else ""
        key = key[2:].removesuffix(".class_path")
        class_path = _class_of(value)
        holder = _object_at(composed, key.split("."))
        if class_path is None or (holder is None and key not in chosen):
            continue
        before = chosen.get(key) or holder or {}
        if before.get("class_path") is not None and not _same_class(before, class_path):
            if holder is not None:
                holder.clear()
                holder["class_path"] = class_path
            kept = [*_without(kept[:-1], key), option]
        chosen[key] = {"class_path": class_path}
    return kept


def _class_of(value: str) -> str | None:
    """The class that an option's value names: a dotted path, a bare name, or JSON with a `class_path`."""
    if re.fullmatch(r"[A-Za-z_][\w.]*", value):
        return None if value in ("null", "true", "false", "None", "True", "False") else value
    if value.lstrip().startswith("{"):
        try:
            content = yaml.safe_load(value)
        except yaml.YAMLError:  # the parser says what is wrong
            return None
        class_path = content.get("class_path") if isinstance(content, dict) else None
        return class_path if isinstance(class_path, str) else None
    return None


def _object_at(layer: Layer, keys: list[str]) -> dict[str, Any] | None:
    """The object with a `class_path` to which keys lead, with or without `init_args` between them."""
    current: Any = layer
    for key in keys:
        if not isinstance(current, dict):
            return None
        if key not in current and "class_path" in current:
            current = current.get("init_args")
        current = current.get(key) if isinstance(current, dict) else None
    return current if isinstance(current, dict) and "class_path" in current else None


def _without(options: list[str], key: str) -> list[str]:
    """The options but for those that set the object at `key` or its arguments."""
    kept: list[str] = []
    skip_value = False
    for option in options:
        if not option.startswith("--"):
            if not skip_value:
                kept.append(option)
            skip_value = False
            continue
        name, equals, _ = option[2:].partition("=")
        mine = name == key or name.startswith(f"{key}.")
        skip_value = mine and not equals
        if not mine:
            kept.append(option)
    return kept


# Marks an object that came from a file of its own, which replaces what earlier layers said.
_WHOLE = "__whole__"


def _nested(value: Any, path: Path) -> Any:
    if not isinstance(value, dict):
        return value
    layer: Layer = {}
    for key, item in value.items():
        _put(layer, str(key).split("."), _nested(item, path), path)
    return layer


def _put(layer: Layer, keys: list[str], value: Any, path: Path) -> None:
    """Sets a dotted key; refuses to write into an object that a file names, or to replace one that has keys."""
    for depth, key in enumerate(keys[:-1]):
        inner = layer.setdefault(key, {})
        if not isinstance(inner, dict) or inner.get(_WHOLE):
            _refuse_both(path, ".".join(keys[: depth + 1]), ".".join(keys))
        layer = inner
    key = keys[-1]
    if isinstance(value, str) and key in REFERENCES:
        if key in layer:
            _refuse_both(path, key, key)
        value = {**load_layer(find_config(value, REFERENCES[key])), _WHOLE: True}
    elif key in layer:
        if not isinstance(value, dict) or not isinstance(layer[key], dict) or layer[key].get(_WHOLE):
            _refuse_both(path, key, key)
        value = merge(layer[key], value)
    layer[key] = value


def _refuse_both(path: Path, key: str, other: str) -> None:
    if key == other:
        problem, moved = f"'{key}' is set twice in this YAML, as a whole and by its keys", "its keys"
    else:
        problem, moved = (
            f"'{key}' refers to a file or is a value, so '{other}' cannot also be set in this YAML",
            f"'{other}'",
        )
    raise UsageError(
        f"{path}: {problem}.\n"
        f"  Write it out in full, or put {moved} into a second file after this one, or on the command line."
    )


def _classes(layer: Layer) -> Iterator[str]:
    """The class names of a run's model and data, without their modules."""
    for part in ("model", "data"):
        value = layer.get(part)
        class_path = value.get("class_path") if isinstance(value, Mapping) else None
        if isinstance(class_path, str):
            yield class_path.rpartition(".")[2]


def _without_marks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_marks(item) for key, item in value.items() if key != _WHOLE}
    return deepcopy(value)
