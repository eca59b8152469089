"""What each step is, as pure functions: its learning rate, its examples, its seed.

Nothing here has a state, so a resumed run needs no sampler to be restored and
a step can be repeated after it ran out of memory.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Sequence
from itertools import islice

AHEAD = 16  # conversations in which one is looked for that fits into what a step has left


def learning_rate(peak: float, step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak at the last step."""
    warmup = min(warmup, total - 1)
    if step <= warmup:
        return peak * step / (warmup + 1)
    way = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * way)))


def order(data_sha256: str, seed: int, epoch: int, count: int) -> list[int]:
    """The conversations of one epoch, shuffled by hash; epochs count from 0."""
    key = f"{data_sha256}:{seed}:{epoch}:"
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{key}{i}".encode()).digest())


Piece = tuple[int, int, int]
"""A conversation, and which of its examples: the first, and the one after the last."""


def steps(shuffled: Sequence[int], sizes: Sequence[int], batch_size: int) -> list[list[Piece]]:
    """The steps of an epoch, of exactly `batch_size` examples each but the last.

    Conversations of `sizes` examples come in their shuffled order. One that
    does not fit into what is left of a step waits if one of the next few fits;
    else it is cut, and its other examples begin the next step.
    """
    out = list[list[Piece]]()
    rest = deque((c, 0) for c in shuffled)
    while rest:
        left, step = batch_size, list[Piece]()
        while left and rest:
            near = islice(enumerate(rest), AHEAD)
            place = next((i for i, (c, done) in near if sizes[c] - done <= left), 0)
            c, first = rest[place]
            del rest[place]
            last = min(sizes[c], first + left)
            step.append((c, first, last))
            left -= last - first
            if last < sizes[c]:
                rest.appendleft((c, last))
        out.append(step)
    return out


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Optimizer steps in an epoch; the last one may be smaller."""
    return -(-count // batch_size)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The random state in which a step begins on a rank: dropout follows from this alone."""
    key = f"step:{seed}:{step}" + (f":{rank}" if rank else "")
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
