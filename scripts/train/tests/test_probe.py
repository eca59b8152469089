"""Memory is measured before the first step, and an update never happens by half."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DEMO, make_plan, play

from lora_train import optimizer, probe
from lora_train.stop import Preempted

MIB = 1 << 20


class Device:
    """A device with a limit, on which a token takes what a test says."""

    def __init__(self, limit: int, a_token: int, recomputed: int, fixed: int = 0) -> None:
        self.limit, self.fixed = limit, fixed
        self.a_token = {False: a_token, True: recomputed}
        self.asked: list[tuple[int, bool]] = []

    def total(self) -> int:
        return self.limit

    def free(self) -> int:
        return self.limit

    def peak(self, tokens: int, recomputed: bool, work: Callable[[], None]) -> int:
        self.asked.append((tokens, recomputed))
        work()
        needed = self.fixed + tokens * self.a_token[recomputed]
        if needed > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return needed


def plan_on(
    device: Device,
    longest: int = 3000,
    can: bool = True,
    missing: int = 0,
    check: Callable[[], None] = lambda: None,
) -> probe.Planned:
    nothing = probe.Probe(device, lambda _: None, lambda: None, lambda: can, check, missing)
    return nothing.plan(longest, 50_000, False)


def test_the_budget_follows_from_two_probes() -> None:
    device = Device(1000 * MIB, MIB // 10, MIB // 100, fixed=40 * MIB)
    planned = plan_on(device, missing=100 * MIB)
    assert device.asked == [(1024, False), (4096, False)]
    assert planned.fits and not planned.recompute
    # 6 % stay free, and what the training will take later is set aside.
    assert planned.budget == pytest.approx((940 - 100 - 40) * 10, rel=1e-3)
    assert planned.need.of(1000) == pytest.approx(140 * MIB, rel=1e-3)
    # Nobody needs endless micro-batches, but the longest sequence must fit in one.
    assert plan_on(Device(1 << 60, 1000, 10)).budget == probe.MOST
    assert plan_on(Device(1 << 60, 1000, 10), longest=100_000).budget == 100_000


def test_recomputation_is_chosen_when_the_longest_does_not_fit_without() -> None:
    device = Device(200 * MIB, MIB // 10, MIB // 50)
    planned = plan_on(device)
    assert planned.recompute and planned.fits
    assert planned.budget == pytest.approx(188 * 50, rel=1e-3)
    # Probes that run out of memory become smaller before recomputation is tried.
    assert [n for n, again in device.asked if not again] == [1024, 4096, 256, 1024]
    hopeless = plan_on(Device(20 * MIB, MIB // 10, MIB // 100), longest=3000)
    assert hopeless.recompute and not hopeless.fits and hopeless.budget == 3000
    cannot = plan_on(Device(200 * MIB, MIB // 10, 1), can=False)
    assert not cannot.recompute and not cannot.fits and cannot.budget == 3000


def test_a_wish_to_leave_is_heard_between_probes() -> None:
    device = Device(1 << 60, 1000, 10)

    def check() -> None:
        if device.asked:
            raise Preempted("SIGTERM")

    with pytest.raises(Preempted):
        plan_on(device, check=check)
    assert len(device.asked) == 1


def test_a_probe_changes_nothing_and_a_resume_keeps_the_budget(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hyper = {"epochs": 1, "dropout": 0.1}
    # Only with recomputation does the longest example fit.
    device = Device(1000 * 200, 1000, 100)
    monkeypatch.setattr(probe, "meter_of", lambda _: device)
    probed = play(make_plan(tmp_path / "probed", DEMO, model, hyper=hyper))
    assert probed.code == 0 and probed.logs("memory_recompute")
    told = probed.of("plan")[0]["memory_plan"]
    assert told["recompute"] and told["bytes_per_token"] == 100
    assert told["device_total"] == device.limit and told["optimizer"] == told["adapter"]
    budget = told["budget_tokens"]
    step = probed.of("checkpoint")[-2]["path"]

    # The same budget without a probe: the same bits, dropout and all.
    monkeypatch.setattr(probe, "meter_of", lambda _: None)
    monkeypatch.setattr("lora_train.loop.BUDGET", budget)
    plain = play(make_plan(tmp_path / "plain", DEMO, model, hyper=hyper))
    assert plain.losses() == probed.losses()

    monkeypatch.setattr(probe, "meter_of", lambda _: Device(1 << 40, 1000, 100))
    rest = play(make_plan(tmp_path / "rest", DEMO, model, hyper=hyper, resume_from=step))
    kept = rest.of("plan")[0]["memory_plan"]
    assert kept["budget_tokens"] == budget and kept["recompute"]
    assert rest.losses() == probed.losses()[-len(rest.losses()) :]


def test_memory_that_runs_out_in_an_update_changes_nothing() -> None:
    def train(fail_at: int, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        p = torch.nn.Parameter(torch.randn(7, 5))
        one = optimizer.Optimizer({"p": p}, 0.1)
        assert one.missing() == 2 * 7 * 5 * 4
        one.begin()
        assert one.missing() == 0
        right = torch._fused_adamw_  # pyright: ignore[reportPrivateImportUsage]

        def out_of_memory(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        for n in range(4):
            p.grad = torch.full_like(p, float(n - 1.5))
            before = p.detach().clone()
            bad = torch.tensor(float(n == 2))
            if n == fail_at:
                monkeypatch.setattr(torch, "_fused_adamw_", out_of_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    one.step(0.1, bad)
                monkeypatch.setattr(torch, "_fused_adamw_", right)
                assert torch.equal(p, before)
            one.step(0.1, bad)
            one.settle(n != 2)
            # What is not finite is skipped on the device.
            assert torch.equal(p, before) == (n == 2)
        assert one.updates == 3 and float(one._inner.state[p]["step"]) == 3
        moments = one.moments()
        again = optimizer.Optimizer({"p": p}, 0.1)
        again.restore(moments, one.updates)
        assert all(torch.equal(again.moments()[n], t) for n, t in moments.items())
        return p.detach(), *moments.values()

    with pytest.MonkeyPatch.context() as m:
        whole = train(-1, m)
        for at in (0, 3):
            assert all(map(torch.equal, whole, train(at, m)))
