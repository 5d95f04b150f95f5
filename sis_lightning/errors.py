"""The two kinds of mistake that the user, not the program, has to mend.

Raise one of these with a message of at most five lines: what is wrong, where (file, key, number), what to do.
The command line prints the message alone and exits with `exit_code`; every other exception is a defect of
ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that its message tells the user how to mend."""

    exit_code: int = 1


class UsageError(UserError, ValueError):
    """A wrong argument, key, name or combination of settings: exit code 2."""

    exit_code = 2


class DataError(UserError):
    """Missing, damaged or unsuitable data or checkpoints: exit code 1."""


class MissingDataError(DataError):
    """A data set that is not in the folder where it is expected."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """Says which known names come near a mistyped one.

    Args:
        word: What was typed.
        known: The names that would have been right.
        count: The most names to list.

    Returns:
        ``"did you mean 'a' or 'b'?"``, or all (or the first twenty) known names where none comes near.
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=count, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    shown = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    return f"known: {shown}" if known else "there are none"
