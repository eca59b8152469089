"""Base models in four bits: a plain adapter comes out, and a host without the library says so."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, Run, make_plan

from lora_train import plan, quantise
from lora_train.failure import Failure

EXTRA = ROOT.parents[1] / ".data" / "qlora"  # where `scripts/setup test` says that it is


def test_a_host_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Failure) as e:
        quantise.settings("nf4", "cuda")
    assert e.value.kind == "device_unavailable" and "qlora.lock" in e.value.hint
    assert quantise.settings("none", "cuda") == {}


def test_spread_weights_are_not_quantised(tmp_path: Path) -> None:
    one = make_plan(tmp_path, DEMO, tmp_path, shard=True, devices=2, quantisation="nf4")
    with pytest.raises(Failure, match="exclude each other"):
        plan.parse(one)


def test_four_bits_train_a_plain_adapter(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = EXTRA.read_text().strip() if EXTRA.is_file() else ""
    if not where and importlib.util.find_spec(quantise.LIBRARY) is None:
        pytest.skip("the extra qlora is not installed")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    # Blocks of 64 numbers share a scale, so nothing may be narrower.
    wide = tmp_path / "wide"
    AutoTokenizer.from_pretrained(model).save_pretrained(wide, save_jinja_files=False)
    config = LlamaConfig.from_pretrained(model, hidden_size=64, intermediate_size=128)
    whole = LlamaForCausalLM(config)
    whole.save_pretrained(wide)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([where, os.environ.get("PYTHONPATH", "")]))
    hyper = {"epochs": 1, "dropout": 0.0}
    made = make_plan(tmp_path / "run", DEMO, wide, hyper=hyper, quantisation="nf4")
    run = Run(made, real=True)
    assert run.finish() == 0, (run.dir / "stderr.txt").read_text()
    size = sum(4 * p.numel() for p in whole.model.layers.parameters())
    saved = 4 * whole.num_parameters() - run.of("plan")[0]["memory_plan"]["weights"]
    assert saved > 0.8 * size
    losses = [float(e["loss"]) for e in run.of("sample")]
    assert losses[-1] < losses[0]
    assert any(e["code"] == "reloaded" for e in run.of("log"))
    settings = json.loads(run.output("adapter_config.json"))
    assert settings["base_model_name_or_path"] == "lorayard/demo-llama"
    assert "q_proj" in settings["target_modules"] and not settings.get("quantization_config")
