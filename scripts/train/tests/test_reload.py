"""An adapter that is not what was trained is never called done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Run

from lora_train import checkpoint, plan, reload
from lora_train.failure import Failure
from lora_train.stop import Preempted

PARTS = [reload.Part(list(range(5, 45)), [False] * 20 + [True] * 20)]


@pytest.fixture
def copied(reference: Run, tmp_path: Path) -> Path:
    return shutil.copytree(reference.of("result")[0]["path"], tmp_path / "adapter")


def asked(reference: Run, adapter: Path) -> dict:
    base = json.loads((reference.dir / "plan.json").read_text())["base_model"]["path"]
    parts = [{"tokens": p.tokens, "trained": p.trained} for p in PARTS]
    return {
        "base": base,
        "adapter": adapter,
        "device": "cpu",
        "half": False,
        "quantisation": "none",
        "threads": 1,
        "parts": parts,
    }


def rewritten(adapter: Path, **over: bytes) -> None:
    """The directory with other files under a manifest that verifies."""
    files = {p.name: p.read_bytes() for p in adapter.iterdir() if p.name != checkpoint.MANIFEST}
    names = {"weights": "adapter_model.safetensors", "config": "adapter_config.json"}
    checkpoint.write(adapter, 1, files | {names[k]: v for k, v in over.items()})


def test_every_run_ends_with_the_proof(reference: Run) -> None:
    codes = [e["code"] for e in reference.of("log")]
    assert codes.count("reloaded") == 1
    order = [e.get("code") or e["ev"] for e in reference.events]
    assert order.index("reloaded") < order.index("result")


def test_another_loss_is_a_failure(reference: Run, copied: Path) -> None:
    one = plan.parse(json.loads((reference.dir / "plan.json").read_text()))
    right = reload.measure(asked(reference, copied))
    with pytest.raises(Failure) as caught:
        reload.prove(one, copied, PARTS, right + 0.01)
    assert caught.value.kind == "trainer_crashed" and "has a loss of" in caught.value.message


def test_what_cannot_be_right_is_named(reference: Run, copied: Path) -> None:
    from safetensors.torch import load_file, save

    good = load_file(copied / "adapter_model.safetensors")
    name = next(iter(good))
    rewritten(copied, weights=save({**good, name: good[name] * float("nan")}))
    with pytest.raises(ValueError, match="not finite"):
        reload.measure(asked(reference, copied))
    rewritten(copied, weights=save({k: v for k, v in good.items() if k != name}))
    with pytest.raises(ValueError, match="do not fit"):
        reload.measure(asked(reference, copied))
    # Half of the alpha loads without a word, and answers differently.
    rewritten(copied, weights=save(good))
    right = reload.measure(asked(reference, copied))
    config = json.loads((copied / "adapter_config.json").read_text())
    rewritten(copied, config=json.dumps({**config, "lora_alpha": 1}).encode())
    assert abs(reload.measure(asked(reference, copied)) - right) > 1e-3
    (copied / "adapter_config.json").write_bytes(b"{}")
    with pytest.raises(checkpoint.Damaged):
        reload.measure(asked(reference, copied))


def test_the_wish_to_leave_ends_the_proof(reference: Run, copied: Path) -> None:
    one = plan.parse(json.loads((reference.dir / "plan.json").read_text()))

    def alive() -> None:
        raise Preempted("SIGTERM")

    with pytest.raises(Preempted):
        reload.prove(one, copied, PARTS, 1.0, alive)


def test_the_batch_is_small() -> None:
    assert reload.batch_of([9000, 8000]) == [1]
    assert reload.batch_of([500, 100, 100, 100, 100, 100]) == [1, 2, 3, 4]
    assert reload.batch_of([1500, 1600]) == [0]
