"""How much memory a micro-batch needs, measured before the first step.

Two forward and backward passes of different size give a line: a fixed part
and bytes for each token. With the free memory of the device it says how many
tokens a micro-batch may have, and whether activations must be recomputed.
Memory that runs out all the same is met by the ladder of `memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lora_train import render
from lora_train.failure import is_out_of_memory

HIGH = 4096  # tokens of the larger probe; the smaller one has a quarter
LEAST = 64  # tokens: below that a line cannot be told from noise
RESERVE = 0.06  # of the device: fragments, and kernels' work space
MOST = 1 << 16  # tokens in a micro-batch: more only makes steps uneven


class Meter(Protocol):
    """What a device tells about its memory, in bytes."""

    def total(self) -> int:
        """All of it."""
        ...

    def free(self) -> int:
        """What this process may still take."""
        ...

    def peak(self, tokens: int, recomputed: bool, work: Callable[[], None]) -> int:
        """The most that `work` takes above what is taken now; may run out of memory."""
        ...


class CudaMeter:
    """The counters of torch's allocator."""

    def total(self) -> int:
        """The device's memory."""
        return torch.cuda.mem_get_info()[1]

    def free(self) -> int:
        """What the driver has left, and what the allocator holds without using it."""
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + held

    def peak(self, tokens: int, recomputed: bool, work: Callable[[], None]) -> int:
        """Measured by the allocator; `tokens` and `recomputed` are not asked."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def meter_of(device: str) -> Meter | None:
    """The device's meter; None where memory is not measured."""
    return CudaMeter() if device == "cuda" else None


@dataclass(frozen=True)
class Need:
    """Bytes that a forward and backward pass takes: a fixed part, and for each token."""

    fixed: int = 0
    a_token: float = 0.0

    def of(self, tokens: int) -> int:
        """Bytes for so many tokens."""
        return int(self.fixed + self.a_token * tokens)


def line(low: tuple[int, int], high: tuple[int, int]) -> Need:
    """The line through two points (tokens, bytes); it rises, and begins at nothing or above."""
    slope = max((high[1] - low[1]) / (high[0] - low[0]), 1.0)
    start = low[1] - slope * low[0]
    if start < 0:  # a curve: the steepest line from nothing is on the safe side
        return Need(0, high[1] / high[0])
    return Need(int(start), slope)


@dataclass(frozen=True)
class Planned:
    """What the probes say: tokens of a micro-batch, recomputation, whether it fits for sure."""

    budget: int
    recompute: bool
    need: Need
    fits: bool


@dataclass(frozen=True)
class Probe:
    """The parts of a training that are needed to measure it.

    `work` does one pass over so many tokens and leaves nothing behind,
    `recompute` turns recomputation on and says whether the model can, `check`
    raises when somebody wants us to leave. `missing` are bytes that the
    training will take later and that are not there yet.
    """

    meter: Meter
    work: Callable[[int], None]
    release: Callable[[], None]
    recompute: Callable[[], bool]
    check: Callable[[], None]
    missing: int

    def plan(self, longest: int, most: int, recomputed: bool) -> Planned:
        """Keep activations if the longest sequence fits so, else recompute them.

        `longest` and `most` are the tokens of the longest sequence and of the
        largest step. With `recomputed` recomputation is on already.
        """
        while True:
            need = self._need(most, recomputed)
            budget = self._budget(need) if need else 0
            if budget >= longest:
                return Planned(min(budget, max(longest, MOST)), recomputed, need or Need(), True)
            if recomputed or not self.recompute():
                # What a line foretells may be wrong: the ladder has the last word.
                return Planned(longest, recomputed, need or Need(), False)
            recomputed = True

    def _need(self, most: int, recomputed: bool) -> Need | None:
        """The line of two probes; None when not even small ones fit."""
        high = max(LEAST, min(HIGH, most))
        while high >= LEAST // 4:
            low = high // 4
            taken = self._taken(low, recomputed)
            more = None if taken is None else self._taken(high, recomputed)
            if taken is not None and more is not None:
                return line((low, taken), (high, more))
            high = low
        return None

    def _taken(self, tokens: int, recomputed: bool) -> int | None:
        """Bytes of one pass; None when memory ran out."""
        self.check()
        taken = None
        try:
            taken = self.meter.peak(tokens, recomputed, lambda: self.work(tokens))
        except Exception as e:
            if not is_out_of_memory(e):
                raise
        # Only outside of the block does nothing hold the tensors of a failed try.
        self.release()
        return taken

    def _budget(self, need: Need) -> int:
        reserve = int(RESERVE * self.meter.total())
        left = self.meter.free() - reserve - self.missing - need.fixed
        return max(0, int(left / need.a_token))


def documents(
    examples: Sequence[render.Sequence], tokens: int, longest: int
) -> list[render.Sequence]:
    """Sequences of so many tokens in all, as long as the longest, every token trained on.

    That costs as much as a micro-batch of this size can.
    """
    text = [t for s in examples[:64] for t in s.tokens]
    while len(text) < tokens:
        text = text * 2
    out, at = [], 0
    while at < tokens:
        end = min(at + longest, tokens)
        end = tokens if tokens - end < 2 else end
        part = tuple(text[at:end])
        out.append(render.Sequence(0, part, (True,) * len(part)))
        at = end
    return out


def describe(
    need: Need, model: torch.nn.Module, moments: int, budget: int, recompute: bool, total: int
) -> dict[str, int | bool]:
    """The memory plan as the protocol has it, in bytes and tokens."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "weights": sum(p.numel() * p.element_size() for p in frozen),
        # The adapter and its gradients.
        "adapter": sum(2 * p.numel() * p.element_size() for p in trained),
        "optimizer": moments,
        "bytes_per_token": round(need.a_token),
        "budget_tokens": budget,
        "recompute": recompute,
        "device_total": total,
    }
