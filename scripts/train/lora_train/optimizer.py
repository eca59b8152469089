"""AdamW of the adapter, whose step happens as a whole or not at all.

The fused kernel takes no memory of its own, and the moments are there before
the first step: memory cannot run out in the middle of an update. Whether a
step is finite is decided on the device, so that nobody waits for the answer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW over named float32 parameters; `updates` counts the steps that were applied."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], weight_decay: float) -> None:
        self.parameters, self.updates, self.rate = parameters, 0, 0.0
        self._inner = torch.optim.AdamW(
            parameters.values(), lr=0.0, weight_decay=weight_decay, fused=True
        )

    def missing(self) -> int:
        """Bytes that `begin` or the first step will take."""
        without = [p for p in self.parameters.values() if not self._inner.state.get(p)]
        return sum(len(MOMENTS) * p.numel() * p.element_size() for p in without)

    def begin(self) -> None:
        """Make all moments zero."""
        self.updates = 0
        for p in self.parameters.values():
            self._inner.state[p] = {n: torch.zeros_like(p) for n in MOMENTS}
            self._inner.state[p]["step"] = torch.zeros((), device=p.device)

    def restore(self, moments: Mapping[str, torch.Tensor], updates: int) -> None:
        """Take over moments as `moments` gave them."""
        if not updates:
            return self.begin()
        self.updates = updates
        for name, p in self.parameters.items():
            self._inner.state[p] = {
                n: moments[f"{name}.{n}"].to(p.device, copy=True) for n in MOMENTS
            }
            self._inner.state[p]["step"] = torch.tensor(float(updates), device=p.device)
        return None

    def moments(self) -> dict[str, torch.Tensor]:
        """The moments by name, on the device; empty before the first update."""
        if not self.updates:
            return {}
        return {
            f"{name}.{n}": self._inner.state[p][n]
            for name, p in self.parameters.items()
            for n in MOMENTS
        }

    def zero_grad(self) -> None:
        """Forget the gradients and their memory."""
        self._inner.zero_grad(set_to_none=True)

    def step(self, rate: float, bad: torch.Tensor) -> None:
        """Apply the gradients unless `bad`, a number on the device, is 1.

        `settle` must follow. When this raises, nothing was applied.
        """
        self.rate = rate
        for settings in self._inner.param_groups:
            settings["lr"] = rate
        self._inner.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        try:
            self._inner.step()
        except BaseException:
            # The library counts before it computes.
            for p in self.parameters.values():
                self._inner.state[p]["step"].fill_(self.updates)
            raise

    def settle(self, finite: bool) -> None:
        """Note, once it is known, whether the last step was applied."""
        self.updates += finite

    def close(self) -> None:
        """Give the memory of the moments back."""
        self._inner.state.clear()
