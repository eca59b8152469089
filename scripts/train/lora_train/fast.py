"""Which layers are exchanged for fast ones, and the proof that they are the same.

The tree of modules and its names stay; only `forward` of single modules is
another. Every exchange is proved on one small batch before the first step:
loss and gradients must be those of the library's own layers. What differs, or
is not known, takes the slow path, which is right for every model.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lora_train import fused, head, packing, render
from lora_train.failure import is_out_of_memory

PATHS = ("head", "linear", "mlp", "norm")
NOISE = 0.02  # of the adapter's second halves in a proof: they are zero at the start
# A path may be twice as far from the plain one as rounding moves that, but never half as far
# as the gradients are long.
ROUNDING = {torch.bfloat16: 2.0**-9}  # relative, of one number
SLACK, MOST_NOISE = 2.0, 0.5

LLAMAS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Granite")
GEMMAS = ("Gemma", "Gemma2", "Gemma3")  # their norms add one to the weight
MLPS = {f"{family}MLP" for family in (*LLAMAS, *GEMMAS)} - {"Phi3MLP"}
NORMS = {
    **{f"{family}RMSNorm": False for family in LLAMAS},
    **{f"{family}RMSNorm": True for family in GEMMAS},
}


def choose(
    forward: packing.Forward,
    examples: Sequence[render.Sequence],
    slow: Sequence[str],
    say: Callable[[str, str], None],
) -> None:
    """Decide how a rank computes: what can be proved is fast, the rest is slow.

    `say` is told in words what is slow that need not be, with a code for it.
    """
    wanted = "the plan wants it so" if "packing" in slow else ""
    if why := wanted or forward.use_packing(examples):
        say(f"sequences are padded, not packed: {why}", "varlen_fallback")
        if odd := forward.check_padding(examples):
            say(f"sequences are not even padded, but one by one: {odd}", "varlen_fallback")

    def warn(why: str) -> None:
        say(f"layers are not exchanged for faster ones: {why}", "fastpath_disabled")

    use(forward, examples, slow, warn)


def use(
    forward: packing.Forward,
    examples: Sequence[render.Sequence],
    slow: Sequence[str],
    warn: Callable[[str], None],
) -> list[str]:
    """Exchange what is known and not in `slow`; the names of the paths that are in use.

    `warn` is told of each path that did not give what the slow one gives.
    """
    switches: dict[str, Callable[[], Callable[[], None] | None]] = {
        "head": lambda: _head(forward),
        "linear": lambda: _exchange(forward.base, _fast_linear),
        "mlp": lambda: _exchange(forward.base, _fast_mlp),
        "norm": lambda: _exchange(forward.base, _fast_norm),
    }
    used: list[str] = []
    plain: packing.Answer | None = None
    noise = 0.0
    batch = packing.proof_batch(examples)
    training = forward.model.training
    forward.model.eval()
    with _noisy(forward.model):
        for name in PATHS:
            if name in slow:
                continue
            if plain is None:
                plain = forward.gradients(batch)
                noise = min(MOST_NOISE, SLACK * _rounding(forward, batch, plain))
            undo = switches[name]()
            if undo is None:
                continue
            why = _differs(forward, batch, plain, noise)
            if why:
                undo()
                warn(f"{name}: {why}")
            else:
                used.append(name)
    forward.model.train(training)
    return used


def _differs(
    forward: packing.Forward,
    batch: Sequence[render.Sequence],
    plain: packing.Answer,
    noise: float,
) -> str:
    """Why the path in use is not the plain one, empty when it is."""
    try:
        return packing.apart(plain, forward.gradients(batch), forward.base.dtype, noise)
    except Exception as e:
        if is_out_of_memory(e):
            raise
        return f"{type(e).__name__}: {e}"


def _rounding(
    forward: packing.Forward, batch: Sequence[render.Sequence], plain: packing.Answer
) -> float:
    """How far the gradients move when every linear layer rounds its output once more.

    0.0 for float32. In bfloat16 this is different for every model, and more
    than any fixed limit would allow for some.
    """
    step = ROUNDING.get(forward.base.dtype)
    if step is None:
        return 0.0
    chance: list[torch.Generator] = []

    def shake(_module: object, _inputs: object, out: torch.Tensor) -> torch.Tensor:
        if not chance:
            chance.append(torch.Generator(out.device).manual_seed(1))
        by = torch.randn(out.shape, generator=chance[0], device=out.device)
        return (out.float() * (1 + step * by)).to(out.dtype)

    layers = [m for m in forward.base.modules() if isinstance(m, torch.nn.Linear)]
    hooks = [m.register_forward_hook(shake) for m in layers]
    try:
        return packing.distance(plain, forward.gradients(batch))[1]
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _noisy(model: torch.nn.Module) -> Iterator[None]:
    """Give the adapters an effect that a proof can see; afterwards they are as before."""
    seconds = [p for n, p in model.named_parameters() if p.requires_grad and ".lora_B." in n]
    before = [p.detach().clone() for p in seconds]
    chance = torch.Generator().manual_seed(1)
    try:
        with torch.no_grad():
            for p in seconds:
                p.copy_(torch.randn(p.shape, generator=chance) * NOISE)
        yield
    finally:
        with torch.no_grad():
            for p, was in zip(seconds, before, strict=True):
                p.copy_(was)


def _head(forward: packing.Forward) -> Callable[[], None] | None:
    found = head.head_of(forward.base)
    if found is None:
        return None
    forward.head = found

    def undo() -> None:
        forward.head = None

    return undo


def _exchange(
    base: torch.nn.Module, fast: Callable[[Any], Callable[..., Any] | None]
) -> Callable[[], None] | None:
    """Exchange `forward` where `fast` has one; the way back, None when there was nothing."""
    done = []
    for module in base.modules():
        # A forward of its own was put there by somebody who needs it.
        if "forward" not in module.__dict__ and (other := fast(module)) is not None:
            module.forward = types.MethodType(other, module)
            done.append(module)

    def undo() -> None:
        for module in done:
            del module.__dict__["forward"]

    return undo if done else None


def _adapter(module: Any) -> tuple[Any, ...] | None:  # noqa: ANN401
    """(weight, bias, a, b, scaling) of a linear layer with one plain adapter, else None."""
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or type(module.base_layer) is not torch.nn.Linear:
        return None
    if module.disable_adapters or module.merged or module.lora_variant:
        return None
    if len(module.active_adapters) != 1 or module.active_adapters[0] not in module.lora_A:
        return None
    name = module.active_adapters[0]
    a, b, base = module.lora_A[name], module.lora_B[name], module.base_layer
    if type(module.lora_dropout[name]) is not torch.nn.Identity or b.bias is not None:
        return None
    # Weights that are split over devices are no plain parameters.
    for p in (base.weight, a.weight, b.weight):
        if type(p) is not torch.nn.Parameter:
            return None
    if base.weight.requires_grad or not base.weight.is_floating_point():
        return None
    return base.weight, base.bias, a.weight, b.weight, module.scaling[name]


def _fast_linear(module: Any) -> Callable[..., Any] | None:  # noqa: ANN401
    return _linear_forward if _adapter(module) else None


def _linear_forward(self: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:  # noqa: ANN401
    parts = _adapter(self)
    if parts is None or more or named or x.dtype != parts[0].dtype:
        return type(self).forward(self, x, *more, **named)
    return fused.linear(x, *parts)


def _fast_mlp(module: Any) -> Callable[..., Any] | None:  # noqa: ANN401
    name = type(module).__name__
    if name == "Phi3MLP":
        return _phi3_forward if _act_of(module.activation_fn) else None
    if name in MLPS:
        return _mlp_forward if _act_of(module.act_fn) else None
    return None


def _act_of(module: Any) -> str:  # noqa: ANN401
    """The activation's name for `fused`, empty when it has none."""
    if isinstance(module, torch.nn.SiLU) or type(module).__name__ == "SiLUActivation":
        return "silu"
    keywords = getattr(getattr(module, "act", None), "keywords", None)
    if type(module).__name__ == "GELUTanh" and keywords == {"approximate": "tanh"}:
        return "gelu"
    return ""


def _mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    return _down(self.down_proj, self.gate_proj(x), self.up_proj(x), _act_of(self.act_fn))


def _phi3_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
    return _down(self.down_proj, gate, up, _act_of(self.activation_fn))


def _down(layer: Any, gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:  # noqa: ANN401
    parts = _adapter(layer)
    # Where the linear layers go the slow way, so does this one.
    if parts is None or "forward" not in layer.__dict__ or gate.dtype != parts[0].dtype:
        return layer(fused.gated(gate, up, act))
    weight, bias, a, b, scaling = parts
    return fused.gated_linear(gate, up, weight, bias, a, b, scaling, act)


def _fast_norm(module: Any) -> Callable[..., Any] | None:  # noqa: ANN401
    plus_one = NORMS.get(type(module).__name__)
    if plus_one is None or module.weight.requires_grad:
        return None
    return _gemma_norm if plus_one else _llama_norm


def _llama_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    return fused.norm(hidden_states, self.weight, self.variance_epsilon, False)


def _gemma_norm(self: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    return fused.norm(x, self.weight, self.eps, True)
