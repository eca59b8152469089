"""What to do when memory runs out, and how much of it a micro-batch needs.

The examples of a step never change. First a micro-batch gets fewer tokens,
then activations are computed twice instead of being kept, and then the
training ends with an estimate in words.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lora_train.failure import Failure

Groups = Callable[[Sequence[int], int], list[list[int]]]
GIB = 1 << 30
COLLECT_EVERY = 100  # steps
RESERVE = 1.2 * GIB  # the device's context and the libraries' work space


def largest(groups: Groups, lengths: Sequence[int], budget: int) -> int:
    """Tokens of the largest micro-batch under a budget."""
    return max(sum(lengths[i] for i in group) for group in groups(lengths, budget))


def smaller_budget(groups: Groups, lengths: Sequence[int], budget: int) -> int | None:
    """The budget halved until it makes a difference; None when no split is left."""
    now = largest(groups, lengths, budget)
    while budget > min(lengths):
        budget //= 2
        if largest(groups, lengths, budget) < now:
            return budget
    return None


def recompute(base: Any) -> bool:  # noqa: ANN401
    """Keep no activations but each layer's input; False when the model cannot."""
    if not getattr(base, "supports_gradient_checkpointing", False):
        return False
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return True


@contextlib.contextmanager
def few_collections() -> Iterator[None]:
    """Let Python look for dead cycles only when `collect` or `release` says so.

    It would look through all modules of the libraries in the middle of steps.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect(step: int) -> None:
    """Look for dead cycles every few steps."""
    if step % COLLECT_EVERY == 0:
        gc.collect()


def release(device: str) -> None:
    """Give back what the failed try held; call it outside of the except block."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def estimate(model: torch.nn.Module, config: Any, tokens: int, recomputed: bool) -> int:  # noqa: ANN401
    """Bytes for one micro-batch of so many tokens, about.

    Weights as they are; gradients and two moments for what is trained; the
    activations that each layer keeps, with the largest ones of one layer when
    they are recomputed; and the head's output.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(12 * p.numel() for p in model.parameters() if p.requires_grad)
    width = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layers = getattr(config, "num_hidden_layers", 0)
    # Two bytes a number: about 8 tensors of the width and 4 of the MLP's.
    kept = 2 * (8 * width + 4 * inner)
    each = layers * 2 * width + kept if recomputed else layers * kept
    wide = 1 if weights and next(model.parameters()).element_size() == 2 else 2
    head = 10 * config.vocab_size
    return int(weights + trained + RESERVE + tokens * (wide * each + head))


def too_large(device: str, tokens: int, needed: int, examples: int) -> Failure:
    """The end of the ladder, in words for the user."""
    has = ""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        has = f" of {total / GIB:.0f} GiB"
    where = "GPU" if device == "cuda" else "host"
    one = "a single example of " if examples == 1 else ""
    return Failure(
        "out_of_memory",
        f"out of {where} memory{has} at {one}{tokens:,} tokens a micro-batch with recomputation;"
        f" about {needed / GIB:.1f} GiB are needed",
        f"Set max_seq_length below {tokens:,}, lower the rank, or choose"
        f" {'a device' if device == 'cuda' else 'a host'} with more memory.",
    )
