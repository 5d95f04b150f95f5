"""The style of figures, and how they are written: the same bytes for the same figure.

The style sheet beside this file sets fonts and colours.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from sis_lightning.files import write_bytes

#: Metadata of each format, without dates and versions, by the ending of the file.
ENDINGS: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
#: Decorator of functions that plot or write a figure.
styled = matplotlib.style.context(Path(__file__).with_name("paper.mplstyle"))


def write_both(figure: Figure, stem: Path, source: str | None = None) -> list[Path]:
    """Writes a figure as PNG (200 dpi) and SVG.

    Args:
        figure: The figure.
        stem: Path of both files without the ending.
        source: Digest of what it was plotted from, which goes into the metadata.

    Returns:
        The two files.
    """
    paths = [stem.with_name(f"{stem.name}{ending}") for ending in (".png", ".svg")]
    for path in paths:
        write_figure(figure, path, {"Source": source} if source else {})
    return paths


@styled
def write_figure(figure: Figure, path: Path, metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes a figure as the ending of `path` says, one of `ENDINGS`; all of the file or nothing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], metadata={**ENDINGS[path.suffix], **metadata})
    write_bytes(path, buffer.getvalue())
