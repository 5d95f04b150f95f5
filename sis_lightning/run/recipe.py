"""Selects the options that affect the result, by the effects that options declare."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from sis_lightning.option_effects import Effect, effects_of
from sis_lightning.run.environment import portable

Config = dict[str, Any]
#: The effects that classes declare for their options, by the paths of the classes.
Declared = Mapping[str, Mapping[str, Effect]]
_SEED = "seed_everything"


def effect_of(key: str, config: Mapping[str, Any], value: Any = None, declared: Declared | None = None) -> Effect:
    """The effect of an option on a run.

    Args:
        key: The option's dotted key in the configuration, such as `model.init_args.backbone.depth`.
        config: A resolved configuration, whose classes declare the effects of their arguments.
        value: The option's value, which for `trainer.precision` decides.
        declared: What classes declare, by their paths; None imports the classes of the configuration.

    Returns:
        The declared effect; RESULT for an option that nobody declared.
    """
    from sis_lightning.run.options import TRAINER_EFFECTS, RunOptions

    parts = key.split(".")
    if parts[0] == "trainer":
        effect = TRAINER_EFFECTS.get(parts[1], Effect.RESULT) if len(parts) > 1 else Effect.RESULT
        return effect if isinstance(effect, Effect) else effect(value)
    if parts[0] in ("model", "data"):
        if len(parts) < 3 or parts[1] != "init_args":
            return Effect.NETWORK if parts[0] == "model" else Effect.RESULT
        path = str(config[parts[0]].get("class_path"))
        return declared_effect(effects_of_path(path) if declared is None else declared.get(path, {}), parts[2:])
    return RunOptions.option_effects.get(parts[0], Effect.RESULT)


def declared_effect(effects: Mapping[str, Effect], parts: Sequence[str]) -> Effect:
    """The effect of a nested option: what is declared for the longest of its prefixes, RESULT if nothing is.

    Args:
        effects: Effects by dotted key, such as `detector` and `detector.box_score_thresh`.
        parts: The keys that lead to the option.
    """
    keys = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((effects[key] for key in keys if key in effects), Effect.RESULT)


@functools.cache
def effects_of_path(class_path: str) -> dict[str, Effect]:
    """The effects that a class declares, by its path; none if it cannot be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        return effects_of(getattr(import_module(module), name))
    except (ImportError, AttributeError, ValueError):  # a user's class that is not installed here
        return {}


def settled(config: Config, declared: Declared | None = None) -> dict[str, Any]:
    """Returns all options that affect the result, except the seed, by dotted keys.

    Runs that agree in them differ by chance alone.

    Args:
        config: A resolved configuration, as a run's `config.yaml` holds it.
        declared: See `effect_of`.

    Returns:
        The options that are given and have any effect; of absolute paths, see `portable`.
    """
    return {key: value for key, value in _flat(config) if effect_of(key, config, value, declared) is not Effect.NOTHING}


def recipe(config: Config, declared: Declared | None = None) -> dict[str, Any]:
    """Returns the recipe: options that affect the result, without numerics, by dotted keys.

    An option that is off counts as absent, since the next release of a library may have one more such option.

    Args:
        config: A resolved configuration.
        declared: See `effect_of`.
    """
    effects = (Effect.RESULT, Effect.NETWORK)
    return {k: v for k, v in _flat(config) if v is not False and effect_of(k, config, v, declared) in effects}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif value is not None and name != _SEED:
            yield name, portable(value)


def changes(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted keys whose values differ, with both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            inner = f"{prefix}.{key}" if prefix else str(key)
            yield from changes(before.get(key), now.get(key), inner)
    elif before != now:
        yield prefix, before, now


def effective_changes(before: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """The changes between two configurations that have any effect: what a resume refuses."""
    return [
        (key, old, new)
        for key, old, new in changes(before, now)
        if effect_of(key, now, new) is not Effect.NOTHING or effect_of(key, before, old) is not Effect.NOTHING
    ]


def changed_recipe(trained: Config, tested: Config) -> tuple[list[tuple[str, Any, Any]], list[tuple[str, Any, Any]]]:
    """Compares the configuration of a test with that of its training.

    Returns:
        The changed options of the recipe, and those of how the numbers are computed, each with both values. An option
        that is off in one and absent in the other is not changed.
    """
    before, now = ({k: v for k, v in settled(config).items() if v is not False} for config in (trained, tested))
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    computed = [
        key
        for key in keys
        if effect_of(key, trained, before.get(key)) is effect_of(key, tested, now.get(key)) is Effect.NUMERICS
    ]
    changed = {key: (key, before.get(key), now.get(key)) for key in keys}
    return [changed[key] for key in keys if key not in computed], [changed[key] for key in computed]
