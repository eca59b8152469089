"""Which state of a training is kept, when it is looked at, and when more is of no use."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_GAIN = 0.005  # of the best loss
SHARE = 0.05  # of the training's tokens that evaluations between epochs may cost
MOST_EVALUATIONS = 20


@dataclass
class Best:
    """The lowest validation loss and where it was; saved in the checkpoint."""

    loss: float | None = None
    step: int = 0
    base: float | None = None  # what the next gain is measured from
    stale: int = 0

    def add(self, loss: float, step: int) -> bool:
        """Take in an evaluation; whether it is the best. A tie keeps the earlier one."""
        if self.base is None or loss < self.base * (1 - LEAST_GAIN):
            self.base, self.stale = loss, 0
        else:
            self.stale += 1
        if self.loss is not None and not loss < self.loss:
            return False
        self.loss, self.step = loss, step
        return True

    def enough(self, patience: int) -> bool:
        """Whether so many evaluations brought no gain; a patience of 0 never ends."""
        return 0 < patience <= self.stale


def evaluate_every(total: int, tokens: int, held_tokens: int) -> int:
    """Steps between evaluations beside those at the ends of epochs; 0 for none.

    `tokens` are those of the whole training, `held_tokens` those of one evaluation.
    """
    affordable = int(SHARE * tokens / max(1, held_tokens))
    count = min(MOST_EVALUATIONS, affordable, total)
    return -(-total // count) if count else 0
