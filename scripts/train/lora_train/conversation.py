"""Rows of one conversation as one sequence with several places to learn from.

The house format repeats a growing history: row k+1 begins with all that row k
says. Where the tokens of the one begin with those of the other, computing both
is waste: one pass over the longer gives the losses of both, to the same
figures, because no token sees what comes after it. It stays two examples, and
each keeps exactly the tokens that it is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_train import render
from lora_train.data import Example, Message


@dataclass(frozen=True)
class Part:
    """One example: the line that it came from, and where the loss is taken, as [start, end)."""

    line: int
    spans: tuple[tuple[int, int], ...]

    @property
    def end(self) -> int:
        """How many tokens its losses need."""
        return self.spans[-1][1]


@dataclass(frozen=True)
class Conversation:
    """Tokens, and the examples that are parts of them, the shortest first."""

    tokens: Sequence[int]
    parts: tuple[Part, ...]

    def cut(self, first: int, last: int) -> render.Sequence:
        """The examples `first` to `last` (not included), and no token after what they need."""
        parts = self.parts[first:last]
        size = len(self.tokens) if last == len(self.parts) else max(p.end for p in parts)
        trained = bytearray(size)
        for p in parts:
            for start, end in p.spans:
                trained[start:end] = b"\x01" * (end - start)
        tokens = self.tokens if size == len(self.tokens) else self.tokens[:size]
        return render.Sequence(parts[-1].line, tokens, bytes(trained))

    def whole(self) -> render.Sequence:
        """All of its examples."""
        return self.cut(0, len(self.parts))


def apart(sequences: Iterable[render.Sequence]) -> list[Conversation]:
    """Every example a conversation of its own."""
    return [Conversation(s.tokens, (Part(s.line, render.spans_of(s.trained)),)) for s in sequences]


def merge(
    pairs: Sequence[tuple[Example, render.Sequence]],
) -> tuple[list[Conversation], list[int]]:
    """The examples as conversations, in the order of their first lines.

    Also the lines of those that go on a conversation, but whose tokens do not:
    these stay by themselves.
    """
    tips: dict[bytes, _Chain] = {}  # by all that was said up to here
    chains, odd = list[_Chain](), list[int]()
    # The shorter one first, so that it is there when the longer one looks for it.
    for example, sequence in sorted(pairs, key=lambda p: (len(p[0].messages), p[0].line)):
        said = _said(example)
        found = next((tips[d] for d in said[-2::-1] if d in tips), None)
        if found is not None and found.learns_again(example):
            found = None
        if found is not None and not found.takes(sequence):
            odd.append(example.line)
            found = None
        if found is None:
            found = _Chain()
            chains.append(found)
        else:
            tips.pop(found.tip, None)
        found.add(example, sequence, said[-1])
        tips[said[-1]] = found
    chains.sort(key=lambda c: min(p.line for p in c.parts))
    return [Conversation(c.tokens, tuple(c.parts)) for c in chains], sorted(odd)


class _Chain:
    """A conversation that grows."""

    def __init__(self) -> None:
        self.tokens: Sequence[int] = ()
        self.parts: list[Part] = []
        self.tip = b""
        self._learned: set[int] = set()  # places of messages
        self._end = 0

    def learns_again(self, example: Example) -> bool:
        """Whether one of its messages is trained on here already: that must count twice."""
        return any(example.messages[i].trained for i in self._learned)

    def takes(self, longer: render.Sequence) -> bool:
        """Whether the tokens go on where they must, and train on nothing twice."""
        same = longer.tokens[: self._end] == self.tokens[: self._end]
        return same and not any(any(longer.trained[a:b]) for p in self.parts for a, b in p.spans)

    def add(self, example: Example, sequence: render.Sequence, tip: bytes) -> None:
        self.tokens, self.tip = sequence.tokens, tip
        self.parts.append(Part(sequence.line, render.spans_of(sequence.trained)))
        self._learned |= {i for i, m in enumerate(example.messages) if m.trained}
        self._end = max(self._end, self.parts[-1].end)


def _said(example: Example) -> list[bytes]:
    """What was said up to each message, as digests; the group and the tools count as said."""
    digest = hashlib.sha256(repr((example.group, example.tools)).encode())
    out = []
    for m in example.messages:
        digest.update(repr(_identity(m)).encode("utf-8", "surrogatepass"))
        out.append(digest.digest())
    return out


def _identity(m: Message) -> tuple[object, ...]:
    return m.role, m.content, m.calls, m.call_id, m.name
