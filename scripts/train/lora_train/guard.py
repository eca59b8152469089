"""Text of the user that reads like a control token of the model, kept as text.

`<|im_end|>` in a question would end the turn for the model, and in an answer
teach it to stop in the middle. Before a template is rendered such strings are
exchanged for private characters, and each of these is tokenized apart, as the
plain text that it stands for.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

FIRST = 0xF0000  # private use: no writing system has these
MOST = 0xFFFD


class Guard:
    """Hides control tokens in texts, and encodes texts in which some are hidden."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        control = {t.content for t in added if t.special} | set(tokenizer.all_special_tokens)
        self._strings = sorted((t for t in control if t), key=lambda t: (-len(t), t))[:MOST]
        ids = tokenizer.convert_tokens_to_ids(self._strings)
        plain = [self._ids(t) for t in self._strings]
        # What the tokenizer cannot take as text stays what it is.
        self._plain = {
            t: p for t, p in zip(self._strings, plain, strict=True) if not set(p) & set(ids)
        }
        self._places = {t: n for n, t in enumerate(self._strings)}
        self._control = _any_of(self._strings)
        self._hidden = re.compile(f"([{chr(FIRST)}-{chr(FIRST + MOST)}])")

    @property
    def fate(self) -> str:
        """What becomes of such text, in words."""
        if len(self._plain) == len(self._strings):
            return "it is taken as plain text"
        return "the model takes some of it as control tokens, as the tokenizer knows no other way"

    def _ids(self, text: str) -> list[int]:
        out = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(out["input_ids"])

    def seen(self, value: Any) -> Counter[str]:  # noqa: ANN401
        """The control tokens in all texts of a value."""
        if isinstance(value, str):
            return Counter(self._control.findall(value)) if self._control else Counter()
        inside = value.values() if isinstance(value, dict) else value
        if not isinstance(value, dict | list | tuple):
            return Counter()
        return sum((self.seen(v) for v in inside), Counter())

    def hide(self, value: Any) -> Any:  # noqa: ANN401
        """The value with its control tokens as private characters, where that can be done."""
        if isinstance(value, str):
            if self._control is None or self._hidden.search(value):
                return value
            return self._control.sub(self._private, value)
        if isinstance(value, dict):
            return {k: self.hide(v) for k, v in value.items()}
        return type(value)(map(self.hide, value)) if isinstance(value, list | tuple) else value

    def _private(self, found: re.Match[str]) -> str:
        text = found[0]
        return chr(FIRST + self._places[text]) if text in self._plain else text

    def show(self, text: str) -> str:
        """The inverse of `hide`."""
        return self._hidden.sub(lambda m: self._shown(m[0]), text)

    def _shown(self, private: str) -> str:
        place = ord(private) - FIRST
        return self._strings[place] if place < len(self._strings) else private

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of a text, and from where to where in the text each stands."""
        tokens, offsets, at = list[int](), list[tuple[int, int]](), 0
        for piece in self._hidden.split(text):
            plain = self._plain.get(self._shown(piece)) if self._hidden.match(piece) else None
            if plain is not None:
                tokens += plain
                offsets += [(at, at + 1)] * len(plain)
            elif piece:
                out = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
                tokens += out["input_ids"]
                offsets += [(at + a, at + b) for a, b in out["offset_mapping"]]
            at += len(piece)
        return tokens, offsets


def _any_of(strings: list[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, strings))) if strings else None
