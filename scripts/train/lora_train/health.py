"""Signs that a training goes wrong: losses that jump, and work that stands still."""

from __future__ import annotations

from dataclasses import dataclass, field

SETTLED = 10  # finite steps before a loss can be called odd
SPIKE = 6.0  # standard deviations above the mean
LEAST_SPREAD = 0.05  # of the mean: below that, a jump is no news
MEMORY = 0.1  # weight of the newest loss
MOST_SPIKES = 20  # in a row: the training has left for good


@dataclass
class Trend:
    """Running mean and variance of the loss; plain numbers, saved in the checkpoint."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    spikes_in_a_row: int = 0

    def add(self, loss: float) -> float:
        """Take in a finite loss; how many deviations above the mean it is if that is a spike.

        0.0 for any other. A spike does not move the trend.
        """
        spread = max(self.variance**0.5, LEAST_SPREAD * abs(self.mean))
        away = (loss - self.mean) / spread if spread > 0 else 0.0
        spike = self.count >= SETTLED and away > SPIKE
        self.spikes_in_a_row = self.spikes_in_a_row + 1 if spike else 0
        if spike:
            return away
        weight = max(MEMORY, 1 / (self.count + 1))
        step = loss - self.mean
        self.mean += weight * step
        self.variance = (1 - weight) * (self.variance + weight * step * step)
        self.count += 1
        return 0.0


FIRST_SECONDS = 1800.0  # longer than any load, save or first step worth waiting for
LEAST_SECONDS = 60.0
SLACK = 5.0  # times what such a piece of work took until now
WARM = 3  # steps before their pace is known


@dataclass
class Pace:
    """How long a piece of work may take, from the seconds that a token took until now."""

    seconds_a_token: float = 0.0
    steps: int = 0

    def took(self, tokens: int, seconds: float) -> None:
        """Note a finished step."""
        each = seconds / max(1, tokens)
        old = self.seconds_a_token
        self.seconds_a_token = each if self.steps == 0 else old + 0.2 * (each - old)
        self.steps += 1

    def allowed(self, tokens: int) -> float:
        """Seconds after which work on so many tokens counts as a hang."""
        if self.steps < WARM:
            return FIRST_SECONDS
        return min(FIRST_SECONDS, max(LEAST_SECONDS, SLACK * self.seconds_a_token * tokens))


@dataclass
class Idle:
    """Seconds without progress in which this process ran.

    The monotonic clock also runs while a process is stopped. So what is longer
    than a beat of the observer, who stands still with it, does not count.
    """

    beat: float
    _last: float | None = field(default=None, init=False)
    _progress: float = field(default=0.0, init=False)
    _idle: float = field(default=0.0, init=False)

    def seen(self, now: float, progress: float) -> float:
        """Seconds of standstill, asked once a beat; `progress` is when something was done."""
        if self._last is None or progress != self._progress:
            self._idle = min(max(0.0, now - progress), self.beat)
        else:
            self._idle += min(now - self._last, 2 * self.beat)
        self._last, self._progress = now, progress
        return self._idle
