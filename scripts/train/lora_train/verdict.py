"""Whether a training learned its examples by heart: validation rises while training falls."""

from __future__ import annotations

from collections.abc import Sequence

RISE = 0.02  # of the lowest validation loss: less is noise
Points = Sequence[tuple[int, float]]


def overfit(evaluations: Points, samples: Points, base: float | None) -> str:
    """`yes`, `no`, or `unknown` without anything to compare.

    All (step, loss); `base` is the validation loss before the first step. It is
    judged from the whole history, and so says `yes` also where the adapter from
    before the rise is the one that is kept.
    """
    seen = [*([(0, base)] if base is not None else []), *evaluations]
    if not evaluations or len(seen) < 2:
        return "unknown"
    lowest = min(range(len(seen)), key=lambda i: seen[i][1])
    rises = seen[-1][1] > seen[lowest][1] * (1 + RISE)
    # What the training loss was when validation was best, and what it is at the end.
    at = max(lowest, 1)
    before = _mean(samples, seen[at - 1][0], seen[at][0])
    after = _mean(samples, seen[-2][0], seen[-1][0])
    if before is None or after is None:
        return "unknown"
    falls = after < before or (lowest == 0 and _falls(samples))
    return "yes" if rises and falls else "no"


def _mean(samples: Points, after: int, to: int) -> float | None:
    inside = [loss for step, loss in samples if after < step <= to]
    return sum(inside) / len(inside) if inside else None


def _falls(samples: Points) -> bool:
    half = len(samples) // 2
    early, late = samples[: max(1, half)], samples[half:]
    return sum(v for _, v in late) / len(late) < sum(v for _, v in early) / len(early)
