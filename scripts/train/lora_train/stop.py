"""The wish to leave early, from a signal, a command or an agent that is gone.

A signal handler may interrupt any line, so it takes no lock: it counts, and
writes one byte into a pipe that wakes whoever waits.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from types import FrameType


class Preempted(Exception):
    """Raised where the wish to leave is noticed."""


class Stop:
    """Asked once: save and leave. Asked twice: leave."""

    def __init__(self, ignore: bool = False) -> None:
        self.ignore = ignore
        self.asked = 0
        self.reason = ""
        self._save = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def install(self) -> None:
        """Take SIGTERM and SIGINT; only the main thread may do this."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    def ask(self, reason: str) -> None:
        """Ask the training to leave; safe in handlers and threads."""
        if self.ignore:
            return
        self.reason = self.reason or reason
        self.asked += 1
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"x")

    def check(self) -> None:
        """Raise Preempted when somebody asked."""
        if self.asked:
            raise Preempted(self.reason)

    def check_twice(self) -> None:
        """Raise Preempted when somebody asked again while we were saving."""
        if self.asked > 1:
            raise Preempted(self.reason)

    def wait(self, seconds: float) -> None:
        """Sleep, but not longer than until somebody asks."""
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            select.select([self._read], [], [], left)

    def want_checkpoint(self) -> None:
        """Ask for a checkpoint after the step in progress."""
        self._save = True

    def take_checkpoint_wish(self) -> bool:
        """True once for every burst of wishes."""
        wish, self._save = self._save, False
        return wish
