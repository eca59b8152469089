"""The check of a device finds what it must, on the CPU with small matrices."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_train import plan, sanity, wire
from lora_train.failure import Failure
from lora_train.session import Session
from lora_train.stop import Stop

SMALL = sanity.Sizes(n=64, copy_bytes=1 << 16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine too, every product is made."""
    monkeypatch.setattr(sanity, "SECONDS", 60.0)


def test_a_good_device_passes_and_is_measured() -> None:
    report = sanity.look(CPU, SMALL)
    assert report.wrong == ""
    assert report.flops > 0
    assert report.copy_bytes_per_second > 0


@pytest.mark.parametrize("place", [(0, 0), (17, 42), (63, 63)])
@pytest.mark.parametrize("amount", [1.0, -2.0, float("nan")])
def test_one_wrong_element_in_one_product_is_found(place: tuple[int, int], amount: float) -> None:
    made = 0

    def broken(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made += 1
        out = a @ b
        if made in (8, 9):  # both of one pair: the bits agree, the numbers do not
            out[place] += amount
        return out

    assert sanity.look(CPU, SMALL, broken).wrong == "1 of 32 matrix products were wrong"


def test_two_errors_that_cancel_are_found() -> None:
    def broken(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = a @ b
        out[5, 7] += 1
        out[5, 9] -= 1
        return out

    assert sanity.look(CPU, SMALL, broken).wrong == "32 of 32 matrix products were wrong"


def test_a_product_that_is_not_the_same_twice_is_found() -> None:
    made = 0

    def broken(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made += 1
        out = a @ b
        if made == 9:  # the second of its pair, which the vector does not see
            out[3, 4] += 1
        return out

    assert "came out differently twice" in sanity.look(CPU, SMALL, broken).wrong


def test_every_sum_is_exact_in_bfloat16() -> None:
    generator = torch.Generator(CPU).manual_seed(0x10A)
    n = 1024
    a, b = sanity._sparse(generator, n, CPU).float(), sanity._sparse(generator, n, CPU).float()
    product = a @ b
    assert torch.equal(product.bfloat16().float(), product)
    # At the size that is used the deviation is sqrt(8) times as large; 256 is far off still.
    assert product.std().item() * (sanity.CUDA.n / n) ** 0.5 * 8 < 256


def session(tmp_path: Path, stream: Path) -> Session:
    raw: dict[str, Any] = {
        "v": 1,
        "job": "j",
        "attempt": 1,
        "backend": "torch",
        "run_dir": str(tmp_path),
        "device": "cpu",
        "sanity": True,
        "base_model": {"name": "m", "path": str(tmp_path)},
        "data": {"path": str(tmp_path / "d"), "sha256": "0" * 64},
        "hyperparameters": {
            "learning_rate": 1e-4,
            "batch_size": 1,
            "epochs": 1,
            "rank": 1,
            "alpha": 1,
        },
    }
    emit = wire.Emitter(job="j", attempt=1, fd=None, path=stream)
    return Session(plan=plan.parse(raw), emit=emit, stop=Stop())


@pytest.mark.parametrize("wrong", ["", "3 of 32 matrix products were wrong"])
def test_the_finding_is_sent_and_a_bad_device_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    stream = tmp_path / "events.jsonl"
    s = session(tmp_path, stream)
    monkeypatch.setattr(sanity, "look", lambda *_: sanity.Report(wrong, "product", 1e15, 3e12, 0.5))
    if wrong:
        with pytest.raises(Failure, match="matrix products") as caught:
            sanity.check(s)
        assert caught.value.kind == "gpu_fault"
    else:
        sanity.check(s)
    s.emit.close()
    event = json.loads(io.StringIO(stream.read_text()).readline())
    assert event["ev"] == "sanity"
    assert (event["index"], event["device"], event["wrong"]) == (0, "cpu", wrong)
    assert event["flops"] == 1e15
