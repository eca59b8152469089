"""Work in a thread of its own, while this one waits for something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
Check = Callable[[], None]


class Cancelled(Exception):
    """Raised in the thread when its result is not wanted any more."""


class Beside(Generic[T]):
    """Begins at once; leaving the `with` block ends it.

    The work is given a function that it calls often: that is how it is told to
    end. It sends no events: their order would be chance.
    """

    def __init__(self, work: Callable[[Check], T], check: Check) -> None:
        self._work, self._check = work, check
        self._cancelled = threading.Event()
        self._beats = 0
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="beside", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._work(self._beat))
        except BaseException as e:
            self._error = e

    def _beat(self) -> None:
        self._beats += 1
        self._check()
        if self._cancelled.is_set():
            raise Cancelled

    def result(self, alive: Check = lambda: None) -> T:
        """What came of it, or the error that it ended with; `alive` runs when it got on."""
        seen = -1
        while self._thread.is_alive():
            self._thread.join(0.1)
            self._check()
            if self._beats != seen:
                seen = self._beats
                alive()
        if self._error is not None:
            raise self._error
        return self._result[0]

    def __enter__(self) -> Beside[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled.set()
        self._thread.join()
