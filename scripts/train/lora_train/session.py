"""What every backend is given, and how a process of ours ends."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lora_train import __version__, failure
from lora_train.failure import Failure
from lora_train.plan import Plan
from lora_train.stop import Preempted, Stop
from lora_train.wire import Clock, Emitter

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Session:
    """One run of one plan. `wait` sleeps, but not past the wish to leave."""

    plan: Plan
    emit: Emitter
    stop: Stop
    clock: Clock = field(default_factory=Clock)
    wait: Callable[[float], None] = lambda _: None
    pid: int = field(default_factory=os.getpid)
    python: str = field(default_factory=platform.python_version)
    began: float = field(default_factory=time.monotonic)  # when somebody wanted the plan done

    def hello(self) -> None:
        """The first event: who speaks."""
        torch = self.plan.backend == "torch"
        self.emit.send(
            "hello",
            trainer=__version__,
            backend=self.plan.backend,
            python=self.python,
            libraries=library_versions() if torch else {},
            device=device_name(self.plan.device),
            pid=self.pid,
        )


def process_began() -> float:
    """When this process was started, by the monotonic clock; now where the system does not tell."""
    now = time.monotonic()
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - age


def device_name(device: str) -> str:
    """The device with its number: the agent shows us only the ones that are ours."""
    return "cuda:0" if device == "cuda" else device


def library_versions() -> dict[str, str]:
    """Installed versions, read without importing anything heavy."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def perform(session: Session, backend: Callable[[Session], None]) -> int:
    """Run a backend to its end, say how it ended, and return the exit code."""
    emit = session.emit
    try:
        session.hello()
        backend(session)
    except Preempted as e:
        return say_exit(emit, failure.EXIT_CODES["preempted"], f"preempted: {e}")
    except BaseException as e:
        return say_failure(emit, failure.classify(e))
    return say_exit(emit, failure.OK, "done")


def say_failure(emit: Emitter, end: Failure) -> int:
    """Send the error and the exit event of a failure."""
    emit.last_words = True
    if end.kind != "preempted":
        emit.send("error", kind=end.kind, message=end.message, hint=end.hint, detail=end.detail)
    return say_exit(emit, end.code, end.kind)


def say_exit(emit: Emitter, code: int, reason: str) -> int:
    """Send the last event."""
    emit.last_words = True
    emit.send("exit", code=code, reason=reason, last_checkpoint_step=emit.last_checkpoint_step)
    return code
