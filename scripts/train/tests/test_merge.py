"""The merged model is the base model with its adapter, in files that Storage takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run

from lora_train import checkpoint, merge, plan, reload
from lora_train.failure import Failure

PARTS = [reload.Part((5, 6, 7, 8, 9, 10), (0, 0, 1, 1, 1, 0))]
FILE_BYTES = 100_000


@pytest.fixture(scope="module")
def merged(reference: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter directory of the undisturbed run, with the merged model in it."""
    adapter = tmp_path_factory.mktemp("merge") / "adapter"
    shutil.copytree(reference.of("result")[0]["path"], adapter)
    raw = json.loads((reference.dir / "plan.json").read_text())
    one = plan.parse({**raw, "merged": True, "merged_file_bytes": FILE_BYTES})
    asked = {"base": str(one.base_model.path), "adapter": str(adapter), "device": "cpu"}
    asked |= {"half": False, "quantisation": "none"}
    parts = [{"tokens": p.tokens, "trained": p.trained} for p in PARTS]
    loss = reload.measure({**asked, "threads": 1, "parts": parts})
    files = merge.write(one, adapter, PARTS, loss)
    there = {f"merged/{p.name}" for p in (adapter / "merged").iterdir()}
    assert {f.name for f in files} == there
    return adapter


def test_logits_are_those_of_base_and_adapter(merged: Path, model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own: Any = AutoModelForCausalLM.from_pretrained(merged / "merged", dtype=torch.float32)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        plain = base(input_ids=tokens).logits
        weight = base.model.layers[0].self_attn.q_proj.weight.clone()
        tuned = PeftModel.from_pretrained(base, merged)
        right, got = tuned(input_ids=tokens).logits, own(input_ids=tokens).logits
        q = base.model.layers[0].self_attn.q_proj
        sum_of_both = (weight + q.get_delta_weight("default")).to(torch.bfloat16).float()
    # To the bit what the sum in float32 rounds to, and so are the answers but for rounding.
    assert torch.equal(own.model.layers[0].self_attn.q_proj.weight, sum_of_both)
    assert (got - right).norm() < 0.02 * right.norm() and (got - right).norm() < 0.2 * (
        plain - right
    ).norm()
    assert AutoTokenizer.from_pretrained(merged / "merged").chat_template


def test_its_files_are_small_and_whole(merged: Path, model: Path) -> None:
    there = merged / "merged"
    verified = checkpoint.verify(there)
    shards = [f for f in verified.files if f.name.endswith(".safetensors")]
    assert len(shards) > 1 and (there / "model.safetensors.index.json").is_file()
    largest = 2 * 4096 * 32  # the embedding cannot be split
    assert all(f.bytes <= max(FILE_BYTES, largest) + 4096 for f in shards)
    assert checkpoint.verify(merged)  # the adapter beside it is untouched
    config = (there / "config.json").read_text()
    assert json.loads(config)["dtype"] == "bfloat16" and str(model) not in config


def test_another_model_is_no_product(
    reference: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = plan.parse(json.loads((reference.dir / "plan.json").read_text()))
    (tmp_path / "merged").mkdir()
    monkeypatch.setattr(merge.reload, "ask", lambda *_: ({"files": [], "loss": 3.5}, ""))
    assert merge.write(one, tmp_path, PARTS, 3.4) == []
    with pytest.raises(Failure, match=r"the merged model has a loss of 3\.5"):
        merge.write(one, tmp_path, PARTS, 3.0)
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr(merge, "ROOM", 1 << 62)
    with pytest.raises(Failure, match="are free") as caught:
        merge.write(one, tmp_path, PARTS, 3.5)
    assert caught.value.kind == "disk_full"
