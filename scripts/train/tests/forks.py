"""Trainer processes that start at once: forked from one that has imported the libraries.

Importing torch, transformers and peft takes nine seconds of a CPU, and the tests
start forty processes. A forked process is as fresh as a new one for all that is
ours; the run that nobody disturbs and the proof of a wrong loss start real ones.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["forks_preload"])
_server: Any = forkserver._forkserver


class Child:
    """What the tests and the trainer use of subprocess.Popen."""

    def __init__(self, target: Any, *args: Any) -> None:
        self._process = context.Process(target=target, args=args)
        self._process.start()
        self.returncode: int | None = None
        self.stdin: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid or 0

    def send_signal(self, number: signal.Signals) -> None:
        """Signal it while it runs."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, the negative number of a signal when one ended it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0)
        self.returncode = self._process.exitcode
        return self.returncode


def _started() -> None:
    """Start the server, which finds its modules here."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(ROOT), before])
    forkserver.ensure_running()
    os.environ["PYTHONPATH"] = before


def trainer(plan: Path, events: int, stderr: Path) -> Child:
    """`python -m lora_train --plan FILE` with its events on a pipe."""
    with multiprocessing.connection.Connection(os.dup(events), readable=False) as pipe:
        _started()
        return Child(_train, plan, pipe, stderr, _server._forkserver_address)


def _train(plan: Path, events: Any, stderr: Path, server: str) -> None:
    # A child would start a server of its own, for nine seconds.
    _server._forkserver_address = server
    _server.ensure_running = resource_tracker.ensure_running
    from lora_train import __main__ as main
    from lora_train import wire

    os.setpgid(0, 0)
    _redirect(stderr, 2)
    os.dup2(events.fileno(), wire.EVENTS_FD)
    os.chdir(ROOT)
    read_anew()
    main._leave(main.main(["--plan", str(plan)]))


class Reader(Child):
    """The process that reads an adapter again, as `reload` starts it."""

    def __init__(self, _: list[str], *, stdout: Any, stderr: Any, **__: Any) -> None:
        read, write = os.pipe()
        files = [multiprocessing.connection.Connection(os.dup(f)) for f in (read, stdout.fileno())]
        super().__init__(_read, *files)
        for f in files:
            f.close()
        os.close(read)
        self.stdin = os.fdopen(write, "wb")


def _read(question: Any, answer: Any) -> None:
    from lora_train import reload

    os.dup2(question.fileno(), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.dup2(answer.fileno(), 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    reload.main()


class Rank(Child):
    """A rank beside this one; `odd` is something that happens to it."""

    odd = ""

    def __init__(self, end: int, _: dict[str, str]) -> None:
        _started()
        with multiprocessing.connection.Connection(os.dup(end)) as to:
            super().__init__(_serve, to, self.odd)


def _serve(to: Any, odd: str) -> None:
    from odd_rank import patch

    from lora_train import rank

    os.chdir(ROOT)
    rank.serve(os.dup(to.fileno()), lambda: patch(odd))


def _redirect(path: Path, fd: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, fd)
    os.close(file)


class _Subprocess:
    """What `reload` uses of the module subprocess, with a forked reader."""

    Popen = Reader
    PIPE = subprocess.PIPE
    TimeoutExpired = subprocess.TimeoutExpired


def read_anew() -> None:
    """Let `reload` of this process fork its reader."""
    from lora_train import reload

    reload.subprocess = _Subprocess  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Let `reload` fork its reader for a while."""
    from lora_train import reload

    _started()
    read_anew()
    try:
        yield
    finally:
        reload.subprocess = subprocess
