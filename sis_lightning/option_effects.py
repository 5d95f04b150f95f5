"""The effect of an option on a run, declared beside the option.

A class that a configuration can build names the effect of each argument of its constructor in a class attribute
`option_effects`. Everything else follows from there: which changed options a resume refuses, in which options a
checkpoint may differ from the run that tests it, and which options make a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Effect(Enum):
    """Effect of a changed option on a run."""

    #: Nothing in the result: where data is read from, what is logged, how many processes work.
    NOTHING = "nothing"
    #: The same experiment, computed differently: precision, deterministic kernels, compilation.
    NUMERICS = "numerics"
    #: The result: how the network is trained or scored. A trained network still fits.
    RESULT = "result"
    #: The network itself: weights of one do not fit the other, or mean something else.
    NETWORK = "network"


def effects_of(cls: type) -> dict[str, Effect]:
    """The effect of each option of a class, including those that its bases declare.

    Args:
        cls: A class with `option_effects`, or whose bases have it.

    Returns:
        The effect of each declared option; what a subclass declares overrides its bases.
    """
    effects: dict[str, Effect] = {}
    for base in reversed(cls.__mro__):
        declared: Mapping[str, Effect] = vars(base).get("option_effects", {})
        effects.update(declared)
    return effects
