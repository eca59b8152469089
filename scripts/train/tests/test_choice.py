"""The best state is the one that is handed out, and a training without gain ends early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, Played, make_plan, play
from safetensors.torch import load_file

from lora_train import choice, loop
from lora_train.stop import Preempted

# So slow that the training loss is still falling where the training ends.
HYPER = {
    "learning_rate": 0.002,
    "dropout": 0.0,
    "epochs": 6,
    "batch_size": 8,
    "early_stopping_patience": 3,
}


def adapter(run: Played) -> dict[str, Any]:
    return load_file(Path(run.of("result")[0]["path"]) / "adapter_model.safetensors")


def rising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the validation loss fall once and then rise."""

    def held_loss(self: Any) -> float:
        return 1.0 + abs(self.state.step - 2 * self.per_epoch) / 100

    monkeypatch.setattr(loop._Trainer, "_held_loss", held_loss)


def test_the_best_adapter_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rising(monkeypatch)
    run = play(make_plan(tmp_path / "run", DEMO, model, hyper=HYPER))
    assert run.code == 0 and run.logs("early_stop") and run.logs("best_kept")
    evals, end = run.of("eval"), run.of("result")[0]
    assert len(evals) == 5 and evals[1]["validation_loss"] == 1.0 == end["validation_loss"]
    assert end["steps"] == evals[-1]["step"] < run.of("plan")[0]["total_steps"]
    assert run.of("checkpoint")[-1]["final"]
    # It says how far it came, and which weights these are.
    assert end["epochs"] == evals[-1]["epoch"] < HYPER["epochs"]
    card = (Path(end["path"]) / "README.md").read_text()
    assert f"of step {evals[1]['step']}, where the validation loss was lowest" in card
    # Training went on to learn by heart, though what is kept is from before that.
    assert end["overfit"] == "yes" and "| overfit | yes" in card

    # It is the adapter of that step, also after a resume from a later one.
    at = evals[1]["step"]
    saved = next(e for e in run.of("checkpoint") if e["step"] > at)
    names = {f["name"] for f in saved["files"]}
    assert "best.safetensors" in names
    later = run.of("checkpoint")[-2]["path"]
    rest = play(make_plan(tmp_path / "rest", DEMO, model, hyper=HYPER, resume_from=later))
    assert rest.code == 0 and rest.logs("best_kept") == run.logs("best_kept")
    one, other = adapter(run), adapter(rest)
    assert all(one[n].equal(other[n]) for n in one)
    kept = load_file(Path(later) / "best.safetensors")
    assert sorted(t.sum().item() for t in kept.values()) == sorted(
        t.float().sum().item() for t in one.values()
    )


def test_best_and_enough() -> None:
    best = choice.Best()
    assert best.add(2.0, 1) and best.add(1.5, 2) and not best.enough(2)
    # A gain below half a percent is the best, but no reason to go on.
    assert best.add(1.499, 3) and best.add(1.498, 4) and not best.add(1.6, 5)
    assert best.enough(3) and not best.enough(4) and not best.enough(0) and best.step == 4


def test_evaluations_stay_within_their_share() -> None:
    assert choice.evaluate_every(total=1000, tokens=10**6, held_tokens=1000) == 50
    assert choice.evaluate_every(total=1000, tokens=10**6, held_tokens=25_000) == 500
    assert choice.evaluate_every(total=1000, tokens=10**6, held_tokens=100_000) == 0
    assert choice.evaluate_every(total=3, tokens=10**6, held_tokens=1) == 1


def test_an_evaluation_that_was_cut_off_is_made_up_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {"dropout": 0.0, "epochs": 2, "batch_size": 8}
    whole = play(make_plan(tmp_path / "whole", DEMO, model, hyper=two))
    right, calls = loop._Trainer._held_loss, [0]

    def cut_off(self: Any) -> float:
        calls[0] += 1
        if calls[0] == 2:  # the first is that of the base model
            raise Preempted("SIGTERM")
        return right(self)

    monkeypatch.setattr(loop._Trainer, "_held_loss", cut_off)
    first = play(make_plan(tmp_path / "first", DEMO, model, hyper=two))
    assert first.code == 75 and not first.of("eval")
    last = first.of("checkpoint")[-1]["path"]
    second = play(make_plan(tmp_path / "second", DEMO, model, hyper=two, resume_from=last))
    assert second.code == 0
    measured = [[(e["step"], e["validation_loss"]) for e in r.of("eval")] for r in (second, whole)]
    assert measured[0] == measured[1] and len(measured[0]) == 2
    assert first.losses() + second.losses() == whole.losses()
