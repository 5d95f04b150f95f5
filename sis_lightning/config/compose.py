"""Finds the project's YAML from any directory and lays several of them over each other, without importing torch.

One run is described by layers, later ones winning: `--config tasks/seg_voc.yaml --config configs/demo.yaml`, then
the options of the command line. A layer may

- name a backbone, a data set or a trainer by its file instead of writing it out: `backbone: sis50` inside a model's
  `init_args` stands for all of `configs/backbones/sis50.yaml`, `data: voc` for `datamodules/voc.yaml`, `trainer: gpu`
  for `configs/trainers/gpu.yaml`. A name replaces whatever the layers below said of it, so that nothing of one
  backbone leaks into another;
- say something only where it applies: below `for:`, keys are class names, and what stands under the class of the
  run's model or data is laid over the rest of that layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from sis_lightning.config_files import PACKAGED, find_config, read_yaml
from sis_lightning.errors import UsageError

# Where the files that a key may name live.
REFERENCES = {"backbone": "configs/backbones", "data": "datamodules", "trainer": "configs/trainers"}

Layer = dict[str, Any]

def load_layer(path: Path) -> Layer:
    """Reads one YAML file, with dotted keys nested and named files put in place.

    Raises:
        UsageError: For YAML that does not parse (with line and column), a key given twice, or a file named beside
            further keys of the same object (`backbone: sis50` and `backbone.depth: 101`: which one should hold?).
    """
    layer: Layer = {}
    for key, value in read_yaml(path).items():
        _put(layer, str(key).split("."), _nested(value, path), path)
    return layer


def merge(below: Layer, above: Layer) -> Layer:
    """Lays one layer over another: mappings key by key, anything else as a whole.

    Where `above` gives an object another class, or names another file for it, nothing of `below`'s object stays:
    one class's arguments mean nothing to another.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not value.get(_WHOLE):
            same_class = value.get("class_path") in (None, old.get("class_path"))
            merged[key] = merge(old, value) if same_class else value
        else:
            merged[key] = value
    return merged


def compose(paths: list[str], named: Layer | None = None) -> Layer:
    """Lays the named files over `configs/defaults.yaml` and each other, the last on top.

    Args:
        paths: As the user typed them.
        named: Another data set in place of the first file's, to which overlays apply too; a trainer, which lies over
            all files.

    Returns:
        Plain nested data without references, dotted keys or `for:` sections.

    Raises:
        UsageError: As `find_config` and `load_layer`.
    """
    composed: Layer = {}
    files = [PACKAGED / "configs" / "defaults.yaml", *map(find_config, paths)]
    layers = [(path, load_layer(path)) for path in files]
    named = named or {}
    # Another data set is part of what the overlays lie over; a trainer is what the run is given, over all files.
    layers.insert(2, (PACKAGED, {key: {**value, _WHOLE: True} for key, value in named.items() if key != "trainer"}))
    layers.append((PACKAGED, {key: value for key, value in named.items() if key == "trainer"}))
    for path, layer in layers:
        sections = layer.pop("for", {})
        if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
            raise UsageError(f"{path}: below 'for:' stand class names, each with the keys for runs of that class")
        composed = merge(composed, layer)
        for class_name in _classes(composed):
            if class_name in sections:
                composed = merge(composed, sections[class_name])
    plain: Layer = _without_marks(composed)
    return plain


def resolve(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Composes the files named by `--config`, `--data NAME` and `--trainer NAME`, and puts names of backbones in place.

    Returns:
        The composed YAML and the remaining options, ready for Lightning's parser.

    Raises:
        UsageError: For files that do not exist or parse.
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
            options += [f"{key}={value}"] if key in ("--data", "--trainer") else [argument]
    composed = compose(files, named)
    if files and "task" not in composed:
        composed["task"] = files[0].rpartition("/")[2].partition(".")[0]
    return composed, options


def load_named(kind: str, name: str) -> Layer:
    """The content of the file that `name` means for a key of `REFERENCES`, such as `backbone`."""
    return load_layer(find_config(name, REFERENCES[kind]))


# Marks an object that came from a file of its own: it replaces what lay below.
_WHOLE = "__whole__"


def _nested(value: Any, path: Path) -> Any:
    if not isinstance(value, dict):
        return value
    layer: Layer = {}
    for key, item in value.items():
        _put(layer, str(key).split("."), _nested(item, path), path)
    return layer


def _put(layer: Layer, keys: list[str], value: Any, path: Path) -> None:
    """Sets a dotted key, refusing to write into an object that is a file's name, or over one that has keys."""
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
    raise UsageError(
        f"{path}: '{key}' names a file or a value, and '{other}' writes into it: one of the two would be lost.\n"
        f"  Write it out in full, or put '{other}' into a second file after this one, or on the command line."
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
