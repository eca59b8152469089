"""Writes checkpoints beside the training, one at a time.

The training gives copies that nobody changes any more; making files of them,
hashing and syncing is done by a thread. A checkpoint counts when it is on the
disk: only then `written` is called, from that thread. What went wrong there is
raised where the training looks next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

from lora_train import checkpoint

Write = Callable[[], checkpoint.Saved]
Written = Callable[[checkpoint.Saved], None]


class Saver:
    """At most one checkpoint in flight."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._host: dict[str, torch.Tensor] = {}
        self._error: BaseException | None = None

    def copies(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors as they are now, in the host's memory, until the next `copies`.

        Waits until nothing is in flight: the memory is the same each time, as
        that for transfers is dear to get.
        """
        self.wait()
        device = next((t.device for t in tensors.values() if t.is_cuda), None)
        for name, t in tensors.items():
            mine = self._host.get(name)
            if mine is None or mine.shape != t.shape or mine.dtype != t.dtype:
                mine = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
                self._host[name] = mine
            mine.copy_(t.detach(), non_blocking=True)
        if device is not None:
            torch.cuda.synchronize(device)
        return {name: self._host[name] for name in tensors}

    def start(self, write: Write, written: Written) -> None:
        """Write in a thread; waits for the one before, and raises what stopped that."""
        self.wait()

        def carry() -> None:
            try:
                written(write())
            except BaseException as e:
                self._error = e

        # A process that must leave at once does not wait for it: no half of it is trusted.
        self._thread = threading.Thread(target=carry, name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what stopped the last one, if it has ended."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is in flight; raise what stopped it."""
        if self._thread is None:
            return
        while self._thread.is_alive():
            self._thread.join(0.2)  # short, so that signals are noticed
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
