"""The trainer's side of the protocol: events out, commands in.

Every event goes to `events.jsonl` first and to the agent second, so that an
agent which was restarted finds in the file what it missed on the pipe. One
lock orders file and pipe alike. The pipe has a thread of its own: an agent
that does not read must not stop the training.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import fcntl
import json
import math
import os
import queue
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_train import health
from lora_train.stop import Stop

VERSION = 1
MAX_LINE = 256 << 10
EVENTS_FD = 3
COMMANDS_FD = 4
HEARTBEAT_SECONDS = 5.0
DRAIN_SECONDS = 5.0

# The fields of every event beside the envelope.
FIELDS = {
    "hello": "trainer backend python libraries device pid",
    "stage": "stage",
    "sanity": "index device wrong check flops copy_bytes_per_second seconds",
    "plan": "total_steps epochs start_step examples validation_examples sequences"
    " tokens_per_epoch loss_tokens_per_epoch trainable_parameters data_sha256 base_model"
    " memory_plan",
    "sample": "step epoch loss learning_rate grad_norm tokens loss_tokens tokens_per_second"
    " seconds skipped",
    "eval": "step epoch validation_loss perplexity tokens loss learning_rate",
    "checkpoint": "step epoch loss path manifest_sha256 bytes files final stall_ms",
    "log": "level message code",
    "heartbeat": "stage step rss_bytes",
    "error": "kind message hint detail",
    "result": "path files steps epochs training_loss validation_loss perplexity"
    " base_validation_loss overfit tokens seconds",
    "exit": "code reason last_checkpoint_step",
}
# Events that may be lost with the machine; the file is not synced for them.
LIGHT = ("sample", "log", "heartbeat")
STAGES = ("preparing", "loading_model", "training", "validating", "saving", "done")


class Clock:
    """The time, so that a transcript can be written twice and be the same."""

    def time(self) -> float:
        """Unix time in seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that only grow."""
        return time.monotonic()


class Emitter:
    """Writes events; safe to use from every thread, never from a signal handler."""

    def __init__(
        self,
        *,
        job: str,
        attempt: int,
        path: Path | None = None,
        fd: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.job, self.attempt = job, attempt
        self.clock = clock or Clock()
        self.stage_now = ""
        self.step_now = 0
        self.last_checkpoint_step = 0
        self.last_words = False
        self._seq = 0
        self._lock = threading.Lock()
        self._file = _open_events(path) if path is not None else None
        self._pipe = _Pipe(fd) if fd is not None else None
        self.progress_at = self.clock.monotonic()
        self.patience = health.FIRST_SECONDS

    def send(self, ev: str, **fields: object) -> None:
        """Append one event to the file and hand it to the agent.

        Raises OSError when the file cannot be written, after the agent has
        the event; not any more once `last_words` is set.
        """
        wanted = set(FIELDS[ev].split())
        if wanted != set(fields):
            odd = sorted(wanted ^ set(fields))
            raise ValueError(f"event {ev!r} does not have the fields of the protocol: {odd}")
        with self._lock:
            self._seq += 1
            head = {
                "v": VERSION,
                "seq": self._seq,
                "ts": int(self.clock.time() * 1000),
                "job": self.job,
                "attempt": self.attempt,
                "ev": ev,
            }
            line = encode({**head, **fields})
            trouble = self._append(line, sync=ev not in LIGHT)
            if self._pipe is not None:
                self._pipe.put(line)
        if trouble is not None and not self.last_words:
            raise trouble

    def _append(self, line: bytes, *, sync: bool) -> OSError | None:
        if self._file is None:
            return None
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(self._file, left) :]
            if sync:
                os.fsync(self._file)
        except OSError as e:
            return e
        return None

    def stage(self, stage: str) -> None:
        """Say what the trainer is doing now."""
        if stage not in STAGES:
            raise ValueError(f"{stage!r} is not a stage")
        self.stage_now = stage
        self.patience = health.FIRST_SECONDS
        self.alive()
        self.send("stage", stage=stage)

    def log(self, level: str, message: str, code: str = "") -> None:
        """Say something to a reader; code names it for machines."""
        self.send("log", level=level, message=message, code=code)

    def alive(self) -> None:
        """Note that something was finished, for whoever looks for a hang."""
        self.progress_at = self.clock.monotonic()

    def expect(self, seconds: float) -> None:
        """Say how long the next piece of work may take before it counts as a hang.

        A new stage sets this back to what is worth waiting for at most.
        """
        self.patience = seconds

    def heartbeat(self) -> None:
        """Say that the process lives."""
        self.send("heartbeat", stage=self.stage_now, step=self.step_now, rss_bytes=rss_bytes())

    def close(self) -> None:
        """Give the agent a moment to read the rest, then let go of the file."""
        if self._pipe is not None:
            self._pipe.close(DRAIN_SECONDS)
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def _open_events(path: Path) -> int:
    """A fresh file; the events of an earlier run in this directory are set aside."""
    if path.exists() and path.stat().st_size > 0:
        n = 1
        while (aside := path.with_name(f"{path.stem}-{n}{path.suffix}")).exists():
            n += 1
        path.rename(aside)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def encode(event: dict[str, Any]) -> bytes:
    """One line of at most MAX_LINE bytes; the longest texts are cut to fit."""
    event = _plain(event)
    while len(line := _dump(event)) > MAX_LINE:
        key = max(event, key=lambda k: len(event[k]) if isinstance(event[k], str) else -1)
        text = event[key]
        if not isinstance(text, str) or len(text) < 64:
            raise ValueError(f"event {event['ev']!r} is longer than {MAX_LINE} bytes")
        event[key] = text[: len(text) // 2] + "… (cut)"
    return line


def _dump(event: dict[str, Any]) -> bytes:
    text = json.dumps(event, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _plain(value: Any) -> Any:  # noqa: ANN401
    """The value with numbers that JSON cannot hold as the protocol's words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


class _Pipe:
    """Carries lines to the agent in order; a broken pipe only ends the carrying."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_inheritable(fd, False)
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 20)
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._carry, name="events", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        self._lines.put(line)

    def close(self, seconds: float) -> None:
        self._lines.put(None)
        self._thread.join(seconds)

    def _carry(self) -> None:
        broken = False
        while (line := self._lines.get()) is not None:
            left = memoryview(line)
            while left and not broken:
                try:
                    left = left[os.write(self._fd, left) :]
                except OSError as e:
                    broken = e.errno not in (errno.EAGAIN, errno.EINTR)
                    if e.errno == errno.EAGAIN:
                        time.sleep(0.01)


class Heartbeat:
    """A thread that says every few seconds that the process lives, and notices a hang."""

    def __init__(self, emit: Emitter, on_hang: Callable[[float], None]) -> None:
        self._emit, self._on_hang = emit, on_hang
        self._idle = health.Idle(HEARTBEAT_SECONDS)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def close(self) -> None:
        """Stop; no heartbeat follows."""
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            # A full disk is noticed by the training itself, at its next event.
            with contextlib.suppress(OSError):
                self._emit.heartbeat()
            now = self._emit.clock.monotonic()
            idle = self._idle.seen(now, self._emit.progress_at)
            if idle > self._emit.patience:
                self._on_hang(idle)


def listen(stop: Stop, fd: int = COMMANDS_FD) -> None:
    """Read commands in a thread; their end means that the agent is gone."""
    os.set_inheritable(fd, False)
    thread = threading.Thread(target=_obey, args=(stop, fd), name="commands", daemon=True)
    thread.start()


def _obey(stop: Stop, fd: int) -> None:
    rest = b""
    while True:
        try:
            chunk = os.read(fd, 4096)
        except OSError:
            chunk = b""
        if not chunk:
            stop.ask("the agent is gone")
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            obey_line(stop, line)


def obey_line(stop: Stop, line: bytes) -> None:
    """Carry out one command; what is not understood is skipped, as the protocol wants."""
    try:
        command = json.loads(line)
        word = command.get("cmd") if isinstance(command, dict) else None
    except (ValueError, RecursionError):
        return
    if word == "checkpoint":
        stop.want_checkpoint()
    elif word == "stop":
        stop.ask("stop command")
    elif word == "dump_stacks":
        dump_stacks()


def dump_stacks() -> None:
    """Write the stacks of all threads to stderr."""
    with contextlib.suppress(OSError, ValueError):
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)


def given_fd(fd: int, *, write: bool) -> int | None:
    """The descriptor when the agent handed one over, else None.

    Must be asked before anything else opens a file that could take the number.
    """
    try:
        mode = os.fstat(fd).st_mode
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return None
    kinds = (stat.S_ISFIFO, stat.S_ISSOCK, stat.S_ISREG, stat.S_ISCHR)
    if not any(is_kind(mode) for is_kind in (kinds if write else kinds[:2])):
        return None
    fits = (os.O_WRONLY, os.O_RDWR) if write else (os.O_RDONLY, os.O_RDWR)
    return fd if access in fits else None


def rss_bytes() -> int:
    """Memory of this process that is in RAM, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
