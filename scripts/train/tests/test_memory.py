"""Memory that runs out: smaller pieces of the same step, then recomputation, then the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DEMO, make_plan, play

from lora_train import optimizer, packing
from lora_train.render import Sequence

RIGHT = packing.Forward.nll
HYPER = {"dropout": 0.0, "epochs": 1}


def limit_tokens(
    monkeypatch: pytest.MonkeyPatch, plain: int, recomputed: int, evaluating: int = 1 << 30
) -> None:
    """Let a micro-batch of more tokens run out of memory."""

    def nll(self: packing.Forward, sequences: list[Sequence]) -> torch.Tensor:
        limit = recomputed if self.base.is_activation_checkpointing else plain
        limit = limit if self.model.training else evaluating
        if sum(len(s.tokens) for s in sequences) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return RIGHT(self, sequences)

    monkeypatch.setattr(packing.Forward, "nll", nll)


def fail_once(right: Callable[..., None], at: int) -> Callable[..., None]:
    """An update that runs out of memory when it is tried for the `at`-th time."""
    count = [0]

    def step(self: optimizer.Optimizer, rate: float, bad: torch.Tensor) -> None:
        count[0] += 1
        if count[0] == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        right(self, rate, bad)

    return step


def test_the_ladder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = play(make_plan(tmp_path / "whole", DEMO, model, hyper=HYPER))
    longest = max(e["tokens"] for e in whole.of("sample"))
    with monkeypatch.context() as m:
        m.setattr(optimizer.Optimizer, "step", fail_once(optimizer.Optimizer.step, 3))
        update = play(make_plan(tmp_path / "update", DEMO, model, hyper=HYPER))
    assert update.code == 0 and len(update.logs("oom_budget")) == 1
    assert update.losses() == pytest.approx(whole.losses(), rel=1e-6)

    limit_tokens(monkeypatch, longest // 2 + 100, 0, evaluating=longest // 2 + 100)
    halved = play(make_plan(tmp_path / "halved", DEMO, model, hyper=HYPER))
    assert halved.code == 0
    assert [e["validation_loss"] for e in halved.of("eval")] == pytest.approx(
        [e["validation_loss"] for e in whole.of("eval")], rel=1e-6
    )
    assert halved.logs("oom_budget") and not halved.logs("oom_recompute")
    # The same examples in every step, so the same loss.
    assert halved.losses() == pytest.approx(whole.losses(), rel=1e-6)

    limit_tokens(monkeypatch, 20, 1 << 20)
    again = play(make_plan(tmp_path / "again", DEMO, model, hyper=HYPER))
    assert again.code == 0 and len(again.logs("oom_recompute")) == 1
    assert again.losses() == pytest.approx(whole.losses(), rel=1e-6)
    # What was learnt about memory is in the checkpoint.
    step = again.of("checkpoint")[-2]["path"]
    rest = play(make_plan(tmp_path / "rest", DEMO, model, hyper=HYPER, resume_from=step))
    assert rest.code == 0 and not rest.logs("oom_recompute")
    assert rest.losses() == again.losses()[-len(rest.losses()) :]

    limit_tokens(monkeypatch, 20, 20)
    end = play(make_plan(tmp_path / "end", DEMO, model, hyper=HYPER))
    assert end.code == 81
    error = end.of("error")[0]
    assert "a single example of" in error["message"] and "GiB are needed" in error["message"]
    assert "max_seq_length" in error["hint"]
