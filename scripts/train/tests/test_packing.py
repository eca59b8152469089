"""Packed rows give what padded ones give, and what cannot be packed is padded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, make_plan
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from lora_train import model, packing, plan
from lora_train.failure import Failure
from lora_train.render import Sequence

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def forward_of(config: Any, dropout: float = 0.0) -> packing.Forward:
    """A small random model of any kind with an adapter whose gradients are not zero."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(
        base,
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=dropout),
    )
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.2)
    return packing.Forward(model, "cpu")


def documents(*lengths: int) -> list[Sequence]:
    rng = random.Random(5)
    return [
        Sequence(
            n,
            tuple(rng.randrange(3, 97) for _ in range(length)),
            tuple(i % 3 > 0 for i in range(length)),
        )
        for n, length in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        MistralConfig(**SMALL, sliding_window=16),
        Qwen2Config(**SMALL),
        Qwen3Config(**SMALL, head_dim=8),
        Phi3Config(**SMALL),
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, attn_pdrop=0),
    ],
    ids=lambda c: c.model_type,
)
def test_packed_rows_equal_padded_ones(config: Any) -> None:
    forward = forward_of(config)
    forward.model.eval()
    some = documents(40, 7, 23, 64)
    plain = forward.gradients(some)
    assert forward.use_packing(some) == "" and forward.packed
    loss, gradients = forward.gradients(some)
    assert loss == pytest.approx(plain[0], rel=1e-6)
    assert (gradients - plain[1]).norm() < 1e-5 * plain[1].norm()
    # No document sees another: each costs the same alone.
    alone = sum(forward.nll([s]).item() for s in some)
    assert alone == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Gemma2Config(**SMALL, head_dim=8), "softcap"),
        (Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), "layers of kind conv"),
    ],
    ids=lambda c: getattr(c, "model_type", None),
)
def test_what_cannot_be_packed_is_padded(config: Any, why: str) -> None:
    forward = forward_of(config)
    own = forward.base.config._attn_implementation
    some = documents(12, 5)
    plain = forward.nll(some).item()
    assert why in forward.use_packing(some)
    assert not forward.packed and forward.base.config._attn_implementation == own
    assert forward.nll(some).item() == plain


def test_padding_is_checked_where_rows_cannot_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    lfm = Lfm2Config(**SMALL, layer_types=["conv", "full_attention"])
    forward, some = forward_of(lfm), documents(12, 5, 40)
    assert forward.check_padding(some) == "" and not forward.alone
    right = packing.padded

    def shifted(sequences: list[Sequence], device: str) -> packing.Batch:
        batch = right(sequences, device)
        return packing.Batch(
            {"input_ids": batch.inputs["input_ids"]}, batch.keep // 2, batch.wanted
        )

    with monkeypatch.context() as m:
        m.setattr(packing, "padded", lambda s, d: (shifted if len(s) > 1 else right)(s, d))
        assert "loss differs" in forward.check_padding(some)
    assert forward.groups([12, 5, 40], 1000) == [[0], [1], [2]]
    monkeypatch.setattr(packing, "padded", lambda *_: 1 / 0)
    with pytest.raises(Failure, match="cannot be trained here") as e:
        forward.check_padding(some)
    assert e.value.kind == "plan_invalid"


def test_a_model_that_takes_no_adapter_is_refused(tmp_path: Path) -> None:
    MambaForCausalLM(
        MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(Failure, match="takes no adapter on all linear layers") as e:
        model.load(plan.parse(make_plan(tmp_path / "run", DEMO, tmp_path)))
    assert e.value.kind == "plan_invalid"


def test_a_leak_between_documents_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = forward_of(LlamaConfig(**SMALL))
    right = packing.Attention.lay_out

    def leaky(self: packing.Attention, lengths: tuple[int, ...], device: str) -> None:
        right(self, (sum(lengths),), device)

    monkeypatch.setattr(packing.Attention, "lay_out", leaky)
    assert "differ" in forward.use_packing(documents(40, 7))
    assert not forward.packed


def test_groups_hold_the_budget_and_are_of_like_size() -> None:
    rng = random.Random(1)
    for budget in (64, 512, 4096):
        lengths = [rng.randrange(2, 600) for _ in range(50)]
        groups = packing.split(lengths, budget)
        assert sorted(i for g in groups for i in g) == list(range(50))
        loads = [sum(lengths[i] for i in g) for g in groups]
        assert all(n <= budget or len(g) == 1 for n, g in zip(loads, groups, strict=True))
        if budget == 4096:
            assert len(groups) == -(-sum(lengths) // budget)
            assert max(loads) < 1.05 * min(loads)
