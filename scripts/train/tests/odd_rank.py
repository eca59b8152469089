"""Something that happens to a rank, put in the way of its forward pass in training."""

from __future__ import annotations

import itertools
from typing import Any


def patch(odd: str) -> None:
    """`memory:<tokens>` runs out of it above these, `fault:<nth>` breaks the device then."""
    if not odd:
        return
    import torch

    from lora_train import packing

    what, _, text = odd.partition(":")
    limit, right, count = int(text), packing.Forward.nll, itertools.count(1)

    def nll(self: packing.Forward, sequences: Any) -> torch.Tensor:
        if self.model.training:
            if what == "memory" and sum(len(s.tokens) for s in sequences) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if what == "fault" and next(count) == limit:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return right(self, sequences)

    packing.Forward.nll = nll
