"""Makes sentences of what Lightning, jsonargparse and torch raise while a run is built."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lightning.fabric.utilities.exceptions import MisconfigurationException

from sis_lightning.errors import UsageError, UserError


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raises UsageError or DataError in place of what a library raises for a mistake of the user.

    Raises:
        UsageError: For options and combinations that a library refuses.
        DataError: As it was raised inside.
    """
    from sis_lightning.run.parser import without_marks

    try:
        yield
    except MisconfigurationException as error:
        raise UsageError(str(error)) from error
    except UsageError as error:
        raise without_marks(error) from error
    except ValueError as error:
        # jsonargparse wraps what a class's constructor raises.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from error
