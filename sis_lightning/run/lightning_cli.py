"""The old name of `sis_lightning.run.start.start`; removed when nobody imports it."""

from sis_lightning.run.start import start as run

__all__ = ["run"]
