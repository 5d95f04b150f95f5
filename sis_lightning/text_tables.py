"""The consoles of the `rich` library, and its tables as plain text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def plain_console(**options: Any) -> Console:
    """A console that prints text as it is: a path such as `runs/a[v2]` or `:x:` is neither markup nor an emoji.

    All output goes through such a console, since most of it contains names that people gave. Styles are given as
    `rich.text.Text`.

    Args:
        **options: Further arguments of `rich.console.Console`.
    """
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


def table_to_text(table: Table, width: int = 120) -> str:
    """Renders a table as text without colours or other control characters.

    Args:
        table: The table.
        width: Largest width in characters; wider cells are wrapped.

    Returns:
        The lines of the table, the last one with a line end.
    """
    text = io.StringIO()
    plain_console(file=text, width=width).print(table)
    return text.getvalue()
