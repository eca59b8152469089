"""Every sample and evaluation of a job, across its attempts, as JSON lines.

The lines travel in the checkpoint, so that the curve of a resumed job has no
gap. What was not finite is null, as JSON knows no NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

FILE = "metrics.jsonl"


class History:
    """What was measured, in the order of the steps."""

    def __init__(self, text: str = "") -> None:
        self._lines = text.splitlines()

    def add(self, ev: str, fields: Mapping[str, object]) -> None:
        """Note one event of the protocol, `sample` or `eval`."""
        row = {"ev": ev} | {k: _finite(v) for k, v in fields.items()}
        self._lines.append(json.dumps(row, separators=(",", ":"), allow_nan=False))

    def points(self, ev: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of one field, without what was not finite."""
        rows = (json.loads(line) for line in self._lines)
        return [(r["step"], r[name]) for r in rows if r["ev"] == ev and r[name] is not None]

    def bytes(self) -> bytes:
        """All of it as the file `metrics.jsonl`."""
        return "".join(line + "\n" for line in self._lines).encode()


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
