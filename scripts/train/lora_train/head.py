"""The loss of trained tokens without the logits of all of them.

The head is frozen, so the gradient of the hidden states is known as soon as
the loss is: some rows at a time become logits, loss and gradient, and are
forgotten. Only these few rows ever stand in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

CHUNK_BYTES = 1 << 28  # of float32 logits that stand at one time
# At least and at most: fewer leave a GPU idle, and more than the smaller probe of the memory has
# tokens would be taken there for memory that every token needs.
ROWS = (512, 1024)
# Models whose logits are the head's output, scaled and capped as their configuration says.
PLAIN = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Phi3ForCausalLM",
)
CAPPED = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")


@dataclass(frozen=True)
class Head:
    """logits = cap · tanh(scale · (hidden · weightᵀ + bias) / cap); a cap of 0 is none."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float = 0.0


def head_of(base: Any) -> Head | None:  # noqa: ANN401
    """The head of a model that is known; None for any other, or one that is trained or split."""
    name, layer = type(base).__name__, getattr(base, "lm_head", None)
    if type(layer) is not torch.nn.Linear or not hasattr(base, "model"):
        return None
    weight, bias = layer.weight, layer.bias
    for t in (weight, bias):
        if t is not None and (type(t) is not torch.nn.Parameter or t.requires_grad):
            return None
    if name in PLAIN:
        return Head(weight, bias)
    if name in CAPPED:
        return Head(weight, bias, cap=base.config.final_logit_softcapping or 0.0)
    if name == "GraniteForCausalLM":
        return Head(weight, bias, scale=1 / base.config.logits_scaling)
    if name == "CohereForCausalLM":
        return Head(weight, bias, scale=base.config.logit_scale)
    return None


def nll(hidden: torch.Tensor, keep: torch.Tensor, wanted: torch.Tensor, head: Head) -> torch.Tensor:
    """Summed negative log likelihood of `wanted` at the rows `keep`, float32, on the device.

    `hidden` is (rows, width); no row may be kept twice.
    """
    return _Nll.apply(hidden, keep, wanted, head)  # pyright: ignore[reportReturnType]


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: torch.Tensor,
        keep: torch.Tensor,
        wanted: torch.Tensor,
        head: Head,
    ) -> torch.Tensor:
        learning = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradient = hidden.new_empty(len(keep) if learning else 0, hidden.shape[1])
        rows = min(ROWS[1], max(ROWS[0], CHUNK_BYTES // (4 * head.weight.shape[0])))
        for start in range(0, len(keep), rows):
            end = start + rows
            picked = hidden[keep[start:end]].to(head.weight.dtype)
            loss, slope = _chunk(picked, wanted[start:end].unsqueeze(1), head, learning)
            total += loss
            if slope is not None:
                gradient[start:end] = slope.to(head.weight.dtype) @ head.weight
            del slope
        ctx.save_for_backward(gradient, keep)
        ctx.rows = hidden.shape[0]
        return total.float()

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        gradient, keep = ctx.saved_tensors
        out = gradient.new_zeros(ctx.rows, gradient.shape[1])
        out.index_copy_(0, keep, gradient * above[0])
        return out, None, None, None


def _chunk(
    picked: torch.Tensor, wanted: torch.Tensor, head: Head, learning: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss of some rows, and its slope with respect to the head's output."""
    z = F.linear(picked, head.weight, head.bias).float()
    if head.scale != 1:
        z.mul_(head.scale)
    if head.cap:
        z.div_(head.cap).tanh_().mul_(head.cap)
    norm = z.logsumexp(1, keepdim=True)
    loss = (norm - z.gather(1, wanted)).sum()
    if not learning:
        return loss, None
    steepness = 1 - (z / head.cap).square_() if head.cap else None
    z.sub_(norm).exp_()
    z.scatter_(1, wanted, z.gather(1, wanted) - 1)
    if steepness is not None:
        z.mul_(steepness)
    return loss, z.mul_(head.scale) if head.scale != 1 else z
