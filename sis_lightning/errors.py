"""The two kinds of mistake that the user, not the program, has to correct.

Raise one of these with a message of at most five lines: what is wrong, where (file, key, value), and what to do. The
command line prints the message only and exits with `exit_code`. Every other exception is a defect of the program and
keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake whose message tells the user how to correct it."""

    exit_code: int = 1


class UsageError(UserError, ValueError):
    """A wrong argument, key, name or combination of settings; exit code 2."""

    exit_code = 2


class DataError(UserError):
    """Missing, damaged or unsuitable data or checkpoints; exit code 1."""


class MissingDataError(DataError):
    """A data set that is not in the folder where it is expected."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """Returns a hint with the known names that are most similar to a mistyped one.

    Args:
        word: The mistyped name.
        known: The valid names.
        count: Largest number of names in the hint.

    Returns:
        ``"did you mean 'a' or 'b'?"``, or a list of all (at most twenty) valid names if none is similar.
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=count, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    names = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    return f"known: {names}" if known else "there are none"
