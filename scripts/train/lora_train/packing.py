"""Sequences side by side in one row: no padding, and no document sees another.

Attention is the only layer of a plain transformer that mixes positions. So a
row of several documents is right when attention is kept within each document
and positions start again at each of them. This is done through the library's
registry of attention functions, and proved on one batch against the padded
path before the first step: what cannot be proved is padded.
"""

from __future__ import annotations

import heapq
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from lora_train import failure, head, render
from lora_train.failure import is_out_of_memory

NAME = "lora_train_varlen"  # unknown to the registry of masks, so that no mask is built
# How far the two paths may be apart, relative: the loss, and the adapter's gradients.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 5e-2)}
PROOF_LENGTHS = (96, 61, 33)
# Layers that carry something from one position to the next by other means than attention.
CARRYING = re.compile(r"mamba|rwkv|recurrent|deltanet|linear_?attention|shortconv")
Answer = tuple[float, torch.Tensor]  # a loss and its gradients
ATTENDING = ("full_attention", "sliding_attention")


def split(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions in as few groups of at most `budget` tokens as can be, of like size.

    A single sequence above the budget gets a group of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = max(1, -(-sum(lengths) // budget))
    while True:
        heap = [(0, n) for n in range(count)]
        groups: list[list[int]] = [[] for _ in range(count)]
        for i in order:
            load, n = heap[0]
            groups[n].append(i)
            heapq.heapreplace(heap, (load + lengths[i], n))
        if all(len(groups[n]) < 2 or load <= budget for load, n in heap):
            return [sorted(g) for g in groups if g]
        count += 1


@dataclass(frozen=True)
class Batch:
    """What a model is given for some sequences, and what it should have predicted.

    `keep` are the places in the flattened output that predict `wanted`.
    """

    inputs: dict[str, torch.Tensor]
    keep: torch.Tensor
    wanted: torch.Tensor
    lengths: tuple[int, ...] = ()  # of the documents of a packed row; empty when padded


def packed(sequences: Sequence[render.Sequence], device: str) -> Batch:
    """All sequences in one row."""
    tokens = [t for s in sequences for t in s.tokens]
    lengths = tuple(len(s.tokens) for s in sequences)
    starts = (0, *accumulate(lengths))
    keep = [
        start + i - 1
        for start, s in zip(starts, sequences, strict=False)
        for i in range(1, len(s.tokens))
        if s.trained[i]
    ]
    ids = torch.tensor([tokens])
    places = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    kept = torch.tensor(keep, dtype=torch.long)
    return Batch(
        {"input_ids": _move(ids, device), "position_ids": _move(places, device)},
        _move(kept, device),
        _move(ids[0][kept + 1], device),
        lengths,
    )


def padded(sequences: Sequence[render.Sequence], device: str) -> Batch:
    """Every sequence in a row of its own, filled up to the longest."""
    width = max(len(s.tokens) for s in sequences)
    tokens = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    keep = []
    for row, s in enumerate(sequences):
        tokens[row, : len(s.tokens)] = torch.tensor(s.tokens)
        mask[row, : len(s.tokens)] = 1
        keep += [row * width + i - 1 for i in range(1, len(s.tokens)) if s.trained[i]]
    kept = torch.tensor(keep, dtype=torch.long)
    return Batch(
        {"input_ids": _move(tokens, device), "attention_mask": _move(mask, device)},
        _move(kept, device),
        _move(tokens.reshape(-1)[kept + 1], device),
    )


def _move(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """To the device without waiting for it."""
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Attention:
    """The registry's function: full or windowed causal attention within each document."""

    def __init__(self) -> None:
        self.lengths: tuple[int, ...] = ()
        self._starts: torch.Tensor | None = None
        self._kernel = _varlen_kernel()

    def lay_out(self, lengths: tuple[int, ...], device: str) -> None:
        """Say of which documents the next row is made; its backward pass may recompute it."""
        self.lengths, self._starts = lengths, None
        if device == "cuda" and self._kernel is not None:
            starts = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
            self._starts = _move(starts, device)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **other: Any,  # noqa: ANN401
    ) -> tuple[torch.Tensor, None]:
        """Tensors are (1, heads, tokens, width); the result is (1, tokens, heads, width)."""
        odd = [n for n in ("softcap", "s_aux", "position_bias") if other.get(n) is not None]
        if odd or attention_mask is not None or not getattr(module, "is_causal", True):
            raise NotImplementedError(f"attention with {', '.join(odd) or 'a mask of its own'}")
        if self._starts is not None and not dropout:
            return self._fused(query, key, value, scaling, sliding_window), None
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        parts = zip(*(t.split(self.lengths, dim=2) for t in (query, key, value)), strict=True)
        out = []
        for q, k, v in parts:
            windowed = sliding_window is not None and q.shape[2] > sliding_window
            out.append(
                F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=_window(q, sliding_window or 0) if windowed else None,
                    is_causal=not windowed,
                    dropout_p=dropout,
                    scale=scaling,
                )
            )
        return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None

    def _fused(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        sliding_window: int | None,
    ) -> torch.Tensor:
        assert self._kernel is not None and self._starts is not None
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
        longest = max(self.lengths)
        out = self._kernel(
            q,
            k,
            v,
            self._starts,
            self._starts,
            longest,
            longest,
            scale=scaling,
            window_size=((sliding_window or 0) - 1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.unsqueeze(0)


def _varlen_kernel() -> Callable[..., Any] | None:
    """torch's own kernel for rows of documents, when it has the arguments we need."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    has = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= set(has) else None


def _window(query: torch.Tensor, width: int) -> torch.Tensor:
    """True where a token is seen: itself and the `width - 1` before it."""
    at = torch.arange(query.shape[2], device=query.device)
    back = at[:, None] - at[None, :]
    return (back >= 0) & (back < width)


class Forward:
    """Summed loss of sequences by the packed path, or by the padded one."""

    def __init__(self, model: Any, device: str) -> None:  # noqa: ANN401
        self.model, self.device = model, device
        self.base = model.get_base_model()
        self._own = self.base.config._attn_implementation
        self.attention = Attention()
        self.packed = False
        self.alone = False  # neither packed nor padded: every sequence is a micro-batch
        self.head: head.Head | None = None  # set: the loss comes from it, some rows at a time
        # Made before they are asked for; with the sequences, so that no other gets their identity.
        self._ready: dict[tuple[int, ...], tuple[Sequence[render.Sequence], Batch]] = {}
        # The head is only run where something is predicted, if the model can leave the rest out.
        self._keeps = "logits_to_keep" in inspect.signature(self.base.forward).parameters

    def nll(self, sequences: Sequence[render.Sequence]) -> torch.Tensor:
        """Summed negative log likelihood of the trained tokens, in nats, on the device."""
        ready = self._ready.pop(tuple(map(id, sequences)), None)
        batch = ready[1] if ready else self._make(sequences)
        self.attention.lay_out(batch.lengths, self.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            if self.head is not None:
                hidden = self.base.model(**batch.inputs, use_cache=False).last_hidden_state
                return head.nll(hidden.flatten(0, 1), batch.keep, batch.wanted, self.head)
            if batch.lengths and self._keeps:
                logits = self.model(**batch.inputs, logits_to_keep=batch.keep).logits[0]
            else:
                logits = self.model(**batch.inputs).logits
                logits = logits.reshape(-1, logits.shape[-1])[batch.keep]
        return F.cross_entropy(logits.float(), batch.wanted, reduction="sum")

    def prepare(self, groups: Sequence[Sequence[render.Sequence]]) -> None:
        """Make what `nll` will be asked for next, with these very sequences."""
        self._ready = {tuple(map(id, group)): (group, self._make(group)) for group in groups}

    def _make(self, sequences: Sequence[render.Sequence]) -> Batch:
        return (packed if self.packed else padded)(sequences, self.device)

    def groups(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        """Positions split into micro-batches that cost at most `budget` tokens."""
        if self.alone:
            return [[i] for i in range(len(lengths))]
        return split(lengths, budget) if self.packed else split_padded(lengths, budget)

    def use_packing(self, examples: Sequence[render.Sequence]) -> str:
        """Pack from now on if it is right for this model; else say why not, in words."""
        why = carries(self.base) or self._switch(NAME) or self._prove(examples)
        if why:
            self.packed = False
            self._switch(self._own)
        return why

    def check_padding(self, examples: Sequence[render.Sequence]) -> str:
        """Leave every sequence alone from now on if padding is wrong for this model; why, in words.

        A state that is carried from one position to the next is not disturbed by
        padding behind it, but nobody vouches for every model. Raises Failure for
        one that cannot be trained at all.
        """
        batch = proof_batch(examples)
        training = self.model.training
        self.model.eval()
        try:
            together = self.gradients(batch)
            each = [self.gradients([s]) for s in batch]
        except Exception as e:
            if failure.classify(e).kind != "trainer_crashed":
                raise
            raise failure.Failure(
                "plan_invalid",
                f"a base model of this kind cannot be trained here ({type(e).__name__}: {e})",
                "Choose a base model of another kind.",
            ) from e
        finally:
            self.model.train(training)
        alone = sum(loss for loss, _ in each), torch.stack([g for _, g in each]).sum(0)
        why = apart(alone, together, self.base.dtype)
        self.alone = bool(why)
        return why

    def _switch(self, name: str) -> str:
        from transformers import AttentionInterface

        if name == NAME:
            AttentionInterface.register(NAME, self.attention)
        try:
            self.base.set_attn_implementation(name)
        except (ValueError, ImportError) as e:
            return f"its attention cannot be exchanged ({type(e).__name__})"
        if self.base.config._attn_implementation != name:
            return "its attention cannot be exchanged"
        return ""

    def _prove(self, examples: Sequence[render.Sequence]) -> str:
        """Compare both paths on one small batch of several documents."""
        batch = proof_batch(examples)
        was_training = self.model.training
        self.model.eval()
        try:
            self._switch(self._own)
            self.packed = False
            plain = self.gradients(batch)
            self._switch(NAME)
            self.packed = True
            return apart(plain, self.gradients(batch), self.base.dtype)
        except Exception as e:
            if is_out_of_memory(e):
                raise
            return f"the model does not take packed rows ({type(e).__name__}: {e})"
        finally:
            self.model.train(was_training)

    def gradients(self, batch: Sequence[render.Sequence]) -> Answer:
        """The loss of sequences, and all gradients of the adapter in a row."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        loss = self.nll(batch)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.item(), torch.cat([g.flatten().double() for g in found if g is not None])


def distance(one: Answer, other: Answer) -> tuple[float, float]:
    """How far losses and gradients are from each other, relative to the first."""
    loss = abs(one[0] - other[0]) / max(abs(one[0]), 1e-12)
    return loss, (one[1] - other[1]).norm().item() / max(one[1].norm().item(), 1e-12)


def apart(one: Answer, other: Answer, dtype: torch.dtype, noise: float = 0.0) -> str:
    """How far two answers are from each other, in words; empty when they are the same.

    `noise` is how far gradients may be apart by rounding alone, if that is known.
    """
    loss_limit, gradient_limit = TOLERANCES[dtype]
    loss, gradients = distance(one, other)
    if loss <= loss_limit and gradients <= max(gradient_limit, noise):
        return ""
    return f"loss differs by {loss:.1e}, gradients by {gradients:.1e}"


def proof_batch(examples: Sequence[render.Sequence]) -> list[render.Sequence]:
    """Some documents of different lengths, all of their tokens trained on."""
    out = []
    for n, length in enumerate(PROOF_LENGTHS):
        tokens = list(examples[n % len(examples)].tokens[:length])
        tokens = tokens if len(tokens) > 1 else tokens * 2
        out.append(render.Sequence(0, tokens, (True,) * len(tokens)))
    return out


def carries(base: Any) -> str:  # noqa: ANN401
    """Why documents of a row would leak into each other, empty when they would not."""
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else None
    kinds = set(getattr(config, "layer_types", None) or ()) - set(ATTENDING)
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if getattr(base, "_is_stateful", False):
        return "it keeps a state from one position to the next"
    for module in base.modules():
        if isinstance(module, torch.nn.Conv1d) or CARRYING.search(type(module).__name__.lower()):
            return f"it has {type(module).__name__} layers"
    return ""


def split_padded(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions grouped by length so that no padded group exceeds the budget in tokens.

    A single example above the budget gets a group of its own. Within a group
    padding stays below an eighth of the longest.
    """
    groups: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = groups and longest * (len(groups[-1]) + 1) <= budget
        if fits and lengths[i] * 8 >= longest * 7:
            groups[-1].append(i)
        else:
            groups.append([i])
            longest = lengths[i]
    return groups
