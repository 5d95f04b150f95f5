"""Tables of the `rich` library as plain text, for the terminal and for tests."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table_to_text(table: Table, width: int = 120) -> str:
    """Renders a table as text without colours or other control characters.

    Args:
        table: The table.
        width: Largest width in characters; wider cells are wrapped.

    Returns:
        The lines of the table, the last one with a line end.
    """
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()
