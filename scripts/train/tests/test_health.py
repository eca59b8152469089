"""A training that goes wrong says so, goes back once, and never stands still for ever."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT, make_plan, play

from lora_train import health, packing, wire
from lora_train.render import Sequence

RIGHT = packing.Forward.nll
HYPER = {"dropout": 0.0, "epochs": 2, "batch_size": 4}


def spoil(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Make the loss of some micro-batches NaN; they count from the first training step."""
    count = [0]
    monkeypatch.setattr("lora_train.loop.BUDGET", 8192)  # a step is one micro-batch

    def nll(self: packing.Forward, sequences: list[Sequence]) -> torch.Tensor:
        loss = RIGHT(self, sequences)
        # The proof and validation run in evaluation mode.
        if self.model.training:
            count[0] += 1
            if first <= count[0] <= last:
                return loss * math.nan
        return loss

    monkeypatch.setattr(packing.Forward, "nll", nll)


def test_nan_steps_are_skipped_then_rolled_back_then_the_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 4, 5)
    two = play(make_plan(tmp_path / "two", DEMO, model, hyper=HYPER))
    assert two.code == 0 and not two.logs("rolled_back")
    assert [e["step"] for e in two.of("sample") if e["skipped"]] == [4, 5]
    # A state in trouble is not saved.
    assert [e["step"] for e in two.of("checkpoint")][:2] == [2, 6]

    spoil(monkeypatch, 4, 6)
    three = play(make_plan(tmp_path / "three", DEMO, model, hyper=HYPER))
    assert three.code == 0 and len(three.logs("rolled_back")) == 1
    samples = three.of("sample")
    assert [e["step"] for e in samples][:9] == [1, 2, 3, 4, 5, 6, 3, 4, 5]
    assert samples[6]["learning_rate"] == pytest.approx(samples[2]["learning_rate"] / 2)
    # The halved rate is in the checkpoint: a resumed run goes on to the same bits.
    before = three.of("checkpoint")[-2]["path"]
    rest = play(make_plan(tmp_path / "rest", DEMO, model, hyper=HYPER, resume_from=before))
    assert rest.losses() == three.losses()[-len(rest.losses()) :]

    spoil(monkeypatch, 1, 1000)
    end = play(make_plan(tmp_path / "end", DEMO, model, hyper=HYPER))
    assert end.code == 82 and len(end.logs("rolled_back")) == 1
    assert [e["step"] for e in end.of("sample")] == [1, 2, 3, 1, 2, 3]
    assert "also with half the learning rate" in end.of("error")[0]["message"]


def test_a_spike_is_told_from_noise() -> None:
    trend = health.Trend()
    for n in range(100):
        assert trend.add(2.0 + 0.1 * math.sin(n)) == 0
    mean = trend.mean
    assert trend.add(4.0) > health.SPIKE and trend.mean == mean
    assert trend.spikes_in_a_row == 1
    assert trend.add(2.1) == 0 and trend.spikes_in_a_row == 0
    # A loss that falls steeply, or is young, is no spike.
    assert trend.add(0.1) == 0 and health.Trend().add(50.0) == 0


def test_the_pace_allows_five_times_what_it_took() -> None:
    pace = health.Pace()
    assert pace.allowed(1000) == health.FIRST_SECONDS
    for _ in range(10):
        pace.took(1000, 20.0)
    assert pace.allowed(1000) == pytest.approx(100)
    assert pace.allowed(10) == health.LEAST_SECONDS
    assert pace.allowed(10**9) == health.FIRST_SECONDS


def test_a_stopped_process_does_not_hang() -> None:
    idle = health.Idle(5.0)
    assert idle.seen(100, progress=99) == 1
    assert idle.seen(105, progress=99) == 6
    # An hour under SIGSTOP counts as two beats at most.
    assert idle.seen(3705, progress=99) == 16
    assert idle.seen(3710, progress=3709) == 1


def test_a_hang_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEARTBEAT_SECONDS", 0.01)
    emit = wire.Emitter(job="j", attempt=1, path=tmp_path / "events.jsonl")
    hung = threading.Event()
    heart = wire.Heartbeat(emit, lambda _: hung.set())
    emit.stage("training")
    heart.start()
    assert not hung.wait(0.1)
    emit.expect(0.05)
    assert hung.wait(30)
    heart.close()
    emit.close()


def test_a_hang_ends_with_the_stacks_and_its_code(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from lora_train import __main__, wire
emit = wire.Emitter(job="j", attempt=1, path=Path({str(tmp_path / "events.jsonl")!r}))
emit.stage("training")
__main__._leave_hanging(emit, 61.0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 83 and "most recent call first" in done.stderr
    assert "no progress for 61 s while training" in (tmp_path / "events.jsonl").read_text()
