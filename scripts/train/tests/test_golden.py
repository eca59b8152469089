"""The transcripts that Go reads are what the emitter writes, event for event."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, make_plan

from lora_train import plan, session, wire
from lora_train.backends import dry
from lora_train.stop import Stop

GOLDEN = Path(__file__).parents[3] / "internal" / "wire" / "testdata"


class FixedClock(wire.Clock):
    """A clock that moves by a tenth of a second whenever it is asked."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        self.now += 0.1
        return 1_764_000_000 + self.now

    def monotonic(self) -> float:
        self.now += 0.1
        return self.now


def play(run_dir: Path, leave_after: int = 0, **over: Any) -> str:
    """The transcript of one dry run, with the run directory named /run."""
    one = plan.parse(make_plan(run_dir, DEMO, run_dir, backend="dry", **over))
    run_dir.mkdir(parents=True, exist_ok=True)
    clock = FixedClock()
    events = run_dir / "events.jsonl"
    emit = wire.Emitter(job=one.job, attempt=one.attempt, path=events, clock=clock)
    stop = Stop()
    waits = [0]

    def wait(_seconds: float) -> None:
        waits[0] += 1
        if leave_after and waits[0] > leave_after:
            stop.ask("SIGTERM")

    run = session.Session(one, emit, stop, clock, wait, pid=4711, python="3.11.7")
    session.perform(run, dry.run)
    emit.close()
    return events.read_text().replace(str(run_dir.parent), "/run")


@pytest.mark.parametrize("name", ["completed", "failed", "preempted", "resumed", "nonfinite"])
def test_transcript(name: str, tmp_path: Path) -> None:
    steps = {"steps": 6, "step_seconds": 0.1}
    if name == "completed":
        text = play(tmp_path / "a", dry=steps)
    elif name == "failed":
        text = play(tmp_path / "a", dry={**steps, "exit_at_step": 4, "exit_code": 81})
    elif name == "preempted":
        text = play(tmp_path / "a", leave_after=3, dry=steps)
    elif name == "resumed":
        play(tmp_path / "a", leave_after=3, dry=steps)
        found = tmp_path / "a" / "checkpoints" / "step-00000003"
        text = play(tmp_path / "b", attempt=2, resume_from=str(found), dry=steps)
    else:
        text = play(tmp_path / "a", dry={**steps, "nonfinite_at_step": 2})
    # Tracebacks name lines of code, which move.
    text = "\n".join(_without_detail(line) for line in text.splitlines()) + "\n"
    golden = GOLDEN / f"{name}.ndjson"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text(), "run with UPDATE_GOLDEN=1 and read the difference"


def _without_detail(line: str) -> str:
    import json

    event = json.loads(line)
    if event.get("detail"):
        event["detail"] = "Traceback"
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"))
