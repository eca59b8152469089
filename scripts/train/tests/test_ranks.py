"""Several ranks: the same training as on one device, and a clean end whatever happens to one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import forks
import pytest
from conftest import DEMO, Played, Run, make_plan, play

from lora_train import channel, ranks, wire
from lora_train import plan as plans
from lora_train.render import made

HYPER = {"dropout": 0.0, "epochs": 1}


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[forks.Rank]:
    """The ranks beside this process."""
    those: list[forks.Rank] = []

    def spawn(end: int, env: dict[str, str]) -> forks.Rank:
        those.append(forks.Rank(end, env))
        return those[-1]

    monkeypatch.setattr(ranks, "spawn", spawn)
    return those


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """The training on one device."""
    return play(make_plan(tmp_path_factory.mktemp("alone") / "run", DEMO, model, hyper=HYPER))


def on_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Have something happen in this process when a step was told."""
    right = wire.Emitter.send

    def send(self: wire.Emitter, ev: str, **said: object) -> None:
        right(self, ev, **said)
        if ev == "sample" and said["step"] == step:
            act()

    monkeypatch.setattr(wire.Emitter, "send", send)


def validation(run: Played) -> list[float]:
    return [e["validation_loss"] for e in run.of("eval")]


def test_two_ranks_train_as_one_and_one_goes_on(
    alone: Played,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[forks.Rank],
) -> None:
    # On the way the second one runs out of memory, and all go on in smaller pieces.
    most = max(e["tokens"] for e in alone.of("sample"))
    monkeypatch.setattr(forks.Rank, "odd", f"memory:{most // 2 - 1}")
    plan = make_plan(tmp_path / "two", DEMO, model, hyper=HYPER, devices=2)
    two = play(plan)
    assert alone.code == two.code == 0, two.events[-2:]
    assert two.logs("oom_budget") and not two.logs("oom_recompute")
    assert two.losses() == pytest.approx(alone.losses(), rel=1e-6)
    assert validation(two) == pytest.approx(validation(alone), rel=1e-6)
    norms = [[e["grad_norm"] for e in r.of("sample")] for r in (two, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert started[0].returncode is not None and not (tmp_path / "two" / "ranks.store").exists()
    saved = two.of("checkpoint")[-2]
    plan |= {"run_dir": str(tmp_path / "rest"), "devices": 1, "resume_from": saved["path"]}
    rest = play(plan)
    assert rest.code == 0 and rest.of("plan")[0]["start_step"] == saved["step"]
    assert rest.losses() == pytest.approx(alone.losses()[saved["step"] :], rel=1e-6)


def test_weights_that_are_spread_train_the_same(
    alone: Played, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_train.loop.BUDGET", 150)  # ranks have different numbers of passes
    two = play(make_plan(tmp_path / "two", DEMO, model, hyper=HYPER, devices=2, shard=True))
    assert two.code == 0, two.events[-2:]
    assert "weights of the base model" in two.logs("ranks")[0]
    assert two.losses() == pytest.approx(alone.losses(), rel=1e-5)
    assert validation(two) == pytest.approx(validation(alone), rel=1e-5)


def test_a_rank_without_memory_ends_ranks_that_share_the_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks.Rank, "odd", "memory:100")
    run = play(make_plan(tmp_path / "run", DEMO, model, hyper=HYPER, devices=2, shard=True))
    assert run.code == 81 and "device 1: " in run.of("error")[0]["message"]


def test_the_group_is_asked_to_leave(alone: Played, model: Path, tmp_path: Path) -> None:
    """SIGTERM reaches all ranks at once, as the shim sends it; the second is a real process."""
    plan = make_plan(tmp_path / "run", DEMO, model, hyper=HYPER, devices=2)
    run = Run(plan)
    others: set[int] = set()

    def act(run: Run, event: dict[str, Any]) -> None:
        if event["ev"] == "sample" and event["step"] == 1:
            pid = run.process.pid
            listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            others.update(map(int, listed.split()))
            os.killpg(pid, signal.SIGTERM)

    assert run.finish(act) == 75, (run.dir / "stderr.txt").read_text()
    saved = run.of("exit")[0]["last_checkpoint_step"]
    assert 1 <= saved < len(alone.losses()) and len(run.of("sample")) == saved
    assert len(others) == 1 and not any(Path(f"/proc/{pid}").exists() for pid in others)
    plan |= {"run_dir": str(tmp_path / "rest"), "devices": 1}
    rest = play({**plan, "resume_from": run.of("checkpoint")[-1]["path"]})
    assert rest.losses() == pytest.approx(alone.losses()[saved:], rel=1e-6)


def test_a_rank_that_dies_ends_all(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[forks.Rank]
) -> None:
    on_step(monkeypatch, 2, lambda: started[0].kill())
    run = play(make_plan(tmp_path / "run", DEMO, model, hyper=HYPER, devices=2))
    assert run.code == 70 and len(run.losses()) == 2
    assert run.of("error")[0]["message"] == "the process of device 1 was ended by SIGKILL"
    assert started[0].returncode is not None


def test_a_rank_whose_device_breaks_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[forks.Rank]
) -> None:
    monkeypatch.setattr(forks.Rank, "odd", "fault:3")
    run = play(make_plan(tmp_path / "run", DEMO, model, hyper=HYPER, devices=2))
    assert run.code == 71 and run.of("error")[0]["kind"] == "gpu_fault"
    assert run.of("error")[0]["message"].startswith("device 1: RuntimeError: CUDA error")
    assert started[0].returncode is not None


def test_shares_are_of_like_size() -> None:
    lengths = [900, 20, 300, 310, 290, 15]
    parts = ranks.shares(lengths, 2)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) - min(loads) < 60
    assert ranks.shares([5], 3) == [[0], [], []]


def test_a_plan_reaches_a_rank_as_it_is(model: Path, tmp_path: Path) -> None:
    one = plans.parse(make_plan(tmp_path / "run", DEMO, model, devices=2))
    assert plans.parse(plans.plain(one)) == one


def test_what_a_rank_is_sent_arrives() -> None:
    sequences = [made(3, (1, 70000, 2), (False, True, False)), made(4, (9,), (True,))]
    sizes, load = channel.packed(sequences)
    assert channel.unpacked(json.loads(json.dumps(sizes)), load) == sequences
    assert channel.unpacked(*channel.packed([])) == []
