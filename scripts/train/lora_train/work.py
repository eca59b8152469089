"""What one rank does with the examples that it is given, and how ranks add it up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lora_train import render
from lora_train.packing import Forward

NOTHING = render.Sequence(0, (0, 0), (False, True))


@dataclass(frozen=True)
class Part:
    """One rank's examples of a step, and how many tokens a micro-batch of it may have.

    With `passes` there are so many micro-batches, empty ones if need be: ranks
    that share the weights must run side by side.
    """

    sequences: Sequence[render.Sequence]
    budget: int
    passes: int = 0


class Work:
    """One model on one device.

    `before` runs before each micro-batch and may raise; `after` when one is done.
    """

    def __init__(
        self,
        forward: Forward,
        device: str,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.forward, self.device = forward, device
        self._before, self._after = before, after
        # In a fixed order: ranks send their gradients as one row of numbers.
        named = sorted(forward.model.named_parameters())
        self.parameters = [p for _, p in named if p.requires_grad]

    def gradients(self, part: Part, loss_tokens: int, seed: int) -> torch.Tensor:
        """Fill the gradients of the adapter; the summed loss divided by `loss_tokens`."""
        torch.manual_seed(seed)
        self.forward.model.train()
        self.clear()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for group, weight in self._groups(part):
            loss = weight * self.forward.nll(group) / loss_tokens
            loss.backward()
            total += loss.detach()
            self._after()
        return total

    def held(self, part: Part) -> float:
        """The summed loss without gradients."""
        self.forward.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for group, weight in self._groups(part):
                total += weight * self.forward.nll(group)
                self._after()
        return total.item()

    def _groups(self, part: Part) -> Iterator[tuple[list[render.Sequence], float]]:
        """Micro-batches and their weight: 0 for what only keeps step with other ranks."""
        lengths = [len(s.tokens) for s in part.sequences]
        groups = self.forward.groups(lengths, part.budget) if lengths else []
        for group in groups:
            self._before()
            yield [part.sequences[i] for i in group], 1.0
        for _ in range(part.passes - len(groups)):
            self._before()
            yield [NOTHING], 0.0

    def layout(self) -> str:
        """How sequences are laid out in a micro-batch."""
        return "packed" if self.forward.packed else "alone" if self.forward.alone else "padded"

    def clear(self) -> None:
        """Let go of the gradients."""
        for p in self.parameters:
            p.grad = None

    # --- Together with other ranks ----------------------------------------------

    def spread(self) -> None:
        """Give every rank the adapter of rank 0."""
        flat = torch.cat([p.detach().flatten() for p in self.parameters])
        dist.broadcast(flat, 0)
        if dist.get_rank() > 0:
            with torch.no_grad():
                for p, new in zip(self.parameters, self._rows(flat), strict=True):
                    p.copy_(new.view_as(p))

    def gather(self) -> None:
        """Sum the gradients of all ranks on rank 0."""
        those = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([g.flatten() for g in those])
        dist.reduce(flat, 0)
        if dist.get_rank() == 0:
            for p, g in zip(self.parameters, self._rows(flat), strict=True):
                p.grad = g.view_as(p)

    def _rows(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flat.split([p.numel() for p in self.parameters])
