"""Signals that ask a run to stop, from the start of the process. Imports nothing heavy."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

#: SIGTERM comes from a scheduler, SIGINT from the user, SIGUSR1 from SLURM some time before the time limit,
#: SIGHUP from a terminal that closes.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_early: list[int] = []


def remember_early() -> None:
    """Remembers a SIGUSR1 that arrives while torch is imported, instead of being killed by it."""
    _early.clear()
    signal.signal(signal.SIGUSR1, lambda number, _: _early.append(number))


class StopRequest:
    """Remembers the first signal that asks to stop; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.number = 0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Handles signals from now on, in this process alone and not in workers that are forked from it."""
        if _early:
            self.number = _early.pop()
        for number in STOPPING:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the run continues after its terminal has closed
            self._before.setdefault(number, signal.getsignal(number))
            signal.signal(number, self._answer)

    def deafen(self) -> None:
        """Restores the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
