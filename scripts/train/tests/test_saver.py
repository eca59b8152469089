"""Checkpoints are written beside the training, and count when they are on the disk."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, make_plan, play

from lora_train import checkpoint, loop, saver

HYPER = {"dropout": 0.0, "epochs": 1}


def saved(step: int) -> checkpoint.Saved:
    return checkpoint.Saved(Path(), step, (), {})


def test_one_is_in_flight_and_counts_when_it_is_written() -> None:
    one, go, told = saver.Saver(), threading.Event(), []

    def write() -> checkpoint.Saved:
        assert go.wait(30)
        return saved(1)

    weights = torch.ones(3)
    copies = one.copies({"w": weights})
    weights.zero_()
    one.start(write, lambda s: told.append(s.step))
    one.check()
    assert told == [] and copies["w"].tolist() == [1, 1, 1]
    threading.Timer(0.1, go.set).start()
    # The copies' memory is used again only after the first one is written.
    assert one.copies({"w": weights})["w"].tolist() == [0, 0, 0] and told == [1]
    one.start(lambda: saved(2), lambda s: told.append(s.step))
    one.wait()
    assert told == [1, 2]


def test_what_went_wrong_is_raised_once_and_nothing_is_told() -> None:
    one, told = saver.Saver(), []

    def fail() -> checkpoint.Saved:
        raise OSError(errno.ENOSPC, "no room")

    one.start(fail, lambda s: told.append(s.step))
    with pytest.raises(OSError, match="no room"):
        one.wait()
    one.check()
    one.start(fail, lambda s: told.append(s.step))
    with pytest.raises(OSError, match="no room"):
        one.copies({})
    assert told == []


def test_training_goes_on_while_a_checkpoint_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right_write, right_step = checkpoint.write, loop._Trainer._step
    begun = [0]

    def step(self: Any, number: int) -> None:
        begun[0] = number
        right_step(self, number)

    def write(target: Path, at: int, *rest: Any) -> checkpoint.Saved:
        waited = threading.Event()
        for _ in range(3000):
            # The last one is waited for, and the adapter is written by the training itself.
            if begun[0] > at or target.parent.name != "checkpoints" or at == last:
                break
            waited.wait(0.01)
        else:
            raise AssertionError("nothing is trained while a checkpoint is written")
        return right_write(target, at, *rest)

    plain = play(make_plan(tmp_path / "plain", DEMO, model, hyper=HYPER))
    last = plain.of("plan")[0]["total_steps"]
    monkeypatch.setattr(loop._Trainer, "_step", step)
    monkeypatch.setattr(checkpoint, "write", write)
    beside = play(make_plan(tmp_path / "beside", DEMO, model, hyper=HYPER))
    assert beside.code == 0 and beside.losses() == plain.losses()
    assert [e["step"] for e in beside.of("checkpoint")] == [
        e["step"] for e in plain.of("checkpoint")
    ]

    def full(target: Path, at: int, *rest: Any) -> checkpoint.Saved:
        raise OSError(errno.ENOSPC, "no room", str(target))

    monkeypatch.setattr(checkpoint, "write", full)
    end = play(make_plan(tmp_path / "end", DEMO, model, hyper=HYPER))
    assert end.code == 73 and not end.of("checkpoint") and end.events[-1]["ev"] == "exit"
    # The first one is due at step 2; it is noticed where the training looks next.
    assert [e["step"] for e in end.of("sample")] in ([1, 2], [1, 2, 3], [1, 2, 3, 4])
