"""Layers with an adapter that keep little for their backward pass.

The library's layers keep a copy of their input for each adapter, in float32
when the adapter is, and four tensors of the MLP's width. These keep the input
itself, once for all who share it, and of the MLP its two halves; what else is
needed is computed again. The adapter stays in float32 and is rounded to the
type of the activations where it is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Gradients = tuple[torch.Tensor | None, ...]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """x · weightᵀ + bias + scaling · (x · aᵀ) · bᵀ; weight and bias are frozen."""
    return _Linear.apply(x, weight, bias, a, b, scaling)  # pyright: ignore[reportReturnType]


def gated_linear(
    gate: torch.Tensor,
    up: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    act: str,
) -> torch.Tensor:
    """`linear` of act(gate) · up, of which only gate and up are kept; act is silu or gelu."""
    out = _GatedLinear.apply(gate, up, weight, bias, a, b, scaling, act)
    return out  # pyright: ignore[reportReturnType]


def gated(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """act(gate) · up, of which only gate and up are kept."""
    return _Gated.apply(gate, up, act)  # pyright: ignore[reportReturnType]


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
    """Root-mean-square norm that keeps its input as it is, not in float32; weight is frozen."""
    return _Norm.apply(x, weight, eps, plus_one)  # pyright: ignore[reportReturnType]


def _adapted(
    flat: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and what stands between a and b."""
    low = flat @ a.to(flat.dtype).T
    out = F.linear(flat, weight, bias)
    out.addmm_(low, b.to(flat.dtype).T, alpha=scaling)
    return out, low


def _adapted_back(
    above: torch.Tensor,
    flat: torch.Tensor,
    low: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    wants: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of input, a and b, as far as they are wanted."""
    below = (above @ b.to(above.dtype)).mul_(scaling)
    of_x = of_a = of_b = None
    if wants[0]:
        of_x = (above @ weight).addmm_(below, a.to(above.dtype))
    if wants[1]:
        of_a = (below.T @ flat).to(a.dtype)
    if wants[2]:
        of_b = (above.T @ low).to(b.dtype).mul_(scaling)
    return of_x, of_a, of_b


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        out, low = _adapted(x.reshape(-1, x.shape[-1]), weight, bias, a, b, scaling)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> Gradients:  # noqa: ANN401
        x, low, weight, a, b = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        dy = above[0].reshape(-1, above[0].shape[-1])
        wants = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5])
        of_x, of_a, of_b = _adapted_back(dy, flat, low, weight, a, b, ctx.scaling, wants)
        return None if of_x is None else of_x.view(x.shape), None, None, of_a, of_b, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        gate: torch.Tensor,
        up: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        act: str,
    ) -> torch.Tensor:
        inner = _act(gate, act).mul_(up)
        flat = inner.reshape(-1, inner.shape[-1])
        out, low = _adapted(flat, weight, bias, a, b, scaling)
        ctx.save_for_backward(gate, up, low, weight, a, b)
        ctx.scaling, ctx.act = scaling, act
        return out.view(*gate.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> Gradients:  # noqa: ANN401
        gate, up, low, weight, a, b = ctx.saved_tensors
        dy = above[0].reshape(-1, above[0].shape[-1])
        act = _act(gate, ctx.act)
        flat = (act * up).reshape(-1, gate.shape[-1])
        wants = (True, *ctx.needs_input_grad[4:6])
        inner, of_a, of_b = _adapted_back(dy, flat, low, weight, a, b, ctx.scaling, wants)
        assert inner is not None
        del flat
        of_gate, of_up = _gated_back(inner.view(gate.shape), gate, up, act, ctx.act)
        return of_gate, of_up, None, None, of_a, of_b, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:  # noqa: ANN401
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _act(gate, act).mul_(up)

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> Gradients:  # noqa: ANN401
        gate, up = ctx.saved_tensors
        return *_gated_back(above[0].clone(), gate, up, _act(gate, ctx.act), ctx.act), None


def _act(gate: torch.Tensor, act: str) -> torch.Tensor:
    return F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")


def _gated_back(
    above: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up; overwrites `above` and `act`."""
    of_up = act.mul_(above)
    above.mul_(up)
    if kind == "silu":
        return torch.ops.aten.silu_backward(above, gate), of_up
    return torch.ops.aten.gelu_backward(above, gate, approximate="tanh"), of_up


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        plus_one: bool,
    ) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        ctx.plus_one = plus_one
        if plus_one:
            return (wide * scale).mul_(1.0 + weight.float()).to(x.dtype)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> Gradients:  # noqa: ANN401
        x, scale, weight = ctx.saved_tensors
        by = 1.0 + weight.float() if ctx.plus_one else weight.float()
        g = above[0].float() * by
        unit = x.float() * scale
        g.sub_(unit.mul_((g * unit).mean(-1, keepdim=True))).mul_(scale)
        return g.to(x.dtype), None, None, None
