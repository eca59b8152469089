"""Fast layers give what the library's own give, keep less, and can be turned off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_packing import SMALL, documents, forward_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from lora_train import fast, fused, head, memory, packing

ALL = list(fast.PATHS)
SHORT = {k: v for k, v in SMALL.items() if k != "head_dim"}
SOME = documents(40, 7, 23, 64)
CONFIGS = [
    LlamaConfig(**SMALL, tie_word_embeddings=True, mlp_bias=True),
    MistralConfig(**SMALL, sliding_window=16),
    Qwen2Config(**SMALL),
    Qwen3Config(**SMALL, head_dim=8),
    GemmaConfig(**SMALL, head_dim=8),
    Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    Gemma3TextConfig(**SMALL, head_dim=8),
    Phi3Config(**SMALL),
    GraniteConfig(**SMALL, logits_scaling=3.0),
]


def kept(work: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage counted once."""
    seen: dict[int, int] = {}
    alive = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        alive.append(t)
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive.append(work())
    return sum(seen.values())


def rounded(config: Any, dtype: torch.dtype, computing: torch.dtype) -> packing.Forward:
    """A packed model whose weights are rounded to one type, and computes in another."""
    forward = forward_of(copy.deepcopy(config))
    for p in forward.model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(dtype).to(computing)
    forward.use_packing(SOME)
    forward.model.eval()
    return forward


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_fast_layers_equal_slow_ones(config: Any) -> None:
    forward = rounded(config, torch.float32, torch.float32)
    plain, before = forward.gradients(SOME), kept(lambda: forward.nll(SOME))
    names = [n for n, _ in forward.model.named_parameters()]
    warnings: list[str] = []
    assert fast.use(forward, SOME, (), warnings.append) == ALL and not warnings
    assert [n for n, _ in forward.model.named_parameters()] == names
    loss, gradients = forward.gradients(SOME)
    assert loss == pytest.approx(plain[0], rel=1e-6)
    assert (gradients - plain[1]).norm() < 1e-5 * plain[1].norm()
    assert kept(lambda: forward.nll(SOME)) < before
    with torch.no_grad():
        assert forward.nll(SOME).item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[5], CONFIGS[7]], ids=lambda c: c.model_type)
def test_fast_layers_round_no_worse(config: Any) -> None:
    def answer(forward: packing.Forward) -> packing.Answer:
        with fast._noisy(forward.model):
            return forward.gradients(SOME)

    truth = answer(rounded(config, torch.bfloat16, torch.float32))
    forward = rounded(config, torch.bfloat16, torch.bfloat16)
    slow = packing.distance(truth, answer(forward))
    assert fast.use(forward, SOME, (), pytest.fail) == ALL
    away = packing.distance(truth, answer(forward))
    assert away[0] < 1e-4 and away[1] < 1.3 * slow[1] + 5e-3


def test_recomputed_layers_are_the_same() -> None:
    forward = rounded(CONFIGS[0], torch.float32, torch.float32)
    fast.use(forward, SOME, (), pytest.fail)
    forward.model.train()
    plain, before = forward.gradients(SOME), kept(lambda: forward.nll(SOME))
    assert memory.recompute(forward.base)
    assert packing.distance(plain, forward.gradients(SOME)) < (1e-9, 1e-6)
    assert kept(lambda: forward.nll(SOME)) < before / 2


def test_a_path_that_differs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = rounded(CONFIGS[3], torch.float32, torch.float32)
    adapter = {n: p.detach().clone() for n, p in forward.model.named_parameters()}
    right = fused._adapted_back

    def wrong(*given: Any) -> fused.Gradients:
        of_x, of_a, of_b = right(*given)
        return of_x, of_a if of_a is None else 1.01 * of_a, of_b

    warnings: list[str] = []
    monkeypatch.setattr(fused, "_adapted_back", wrong)
    assert fast.use(forward, SOME, (), warnings.append) == ["head", "mlp", "norm"]
    assert len(warnings) == 1 and warnings[0].startswith("linear: loss differs by")
    monkeypatch.setattr(fused, "_adapted_back", right)
    chance = torch.get_rng_state()
    forward = rounded(CONFIGS[3], torch.float32, torch.float32)
    torch.set_rng_state(chance)
    assert fast.use(forward, SOME, ("norm", "head"), pytest.fail) == ["linear", "mlp"]
    # A proof leaves the adapter and the random numbers as they were.
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(p, adapter[n]) for n, p in forward.model.named_parameters())


def test_what_is_not_known_goes_the_slow_way() -> None:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=256)
    forward = forward_of(config)
    assert fast.use(forward, SOME, (), pytest.fail) == []
    # Dropout between input and adapter is the library's affair, and so is a layer switched off.
    forward = forward_of(copy.deepcopy(CONFIGS[0]), dropout=0.1)
    assert fast.use(forward, SOME, (), pytest.fail) == ["head", "mlp", "norm"]
    forward = rounded(CONFIGS[0], torch.float32, torch.float32)
    fast.use(forward, SOME, (), pytest.fail)
    tuned = forward.nll(SOME).item()
    with forward.model.disable_adapter():
        assert abs(forward.nll(SOME).item() - tuned) > 1e-3


class Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.numel())
        return out


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.3, 0.0), (1.0, 5.0), (2.0, 3.0)])
def test_the_head_never_has_all_logits(
    scale: float, cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    rows, width, words = 200, 16, 500
    hidden = torch.randn(rows, width, requires_grad=True)
    one = head.Head(torch.randn(words, width), torch.randn(words), scale, cap)
    keep = torch.arange(0, rows, 2)
    wanted = torch.randint(words, (len(keep),))
    logits = scale * torch.nn.functional.linear(hidden[keep], one.weight, one.bias)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    plain = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    (expected,) = torch.autograd.grad(plain / 7, [hidden])
    monkeypatch.setattr(head, "ROWS", (16, 16))
    with Largest() as largest:
        loss = head.nll(hidden, keep, wanted, one)
        (found,) = torch.autograd.grad(loss / 7, [hidden])
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert largest.numbers == max(16 * words, words * width)
