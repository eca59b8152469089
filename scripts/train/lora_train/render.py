"""Messages to tokens, and which of them the loss is taken on.

The assistant's text is found with proof in what the chat template makes of a
conversation; a base model without a template gets a plain one of ours, and
never new tokens.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Values
from dataclasses import dataclass, replace
from typing import Any

from lora_train.data import Example, Message
from lora_train.failure import Failure
from lora_train.guard import Guard
from lora_train.template import Refused, Template, Tools, Unproven

OPEN, CLOSE = "«", "»"  # around trained text, for people


@dataclass(frozen=True)
class Sequence:
    """Tokens that are computed together; `trained[i]` says that token i is to be predicted."""

    line: int
    tokens: Values[int]
    trained: Values[int]
    shortened: bool = False  # something of the example was left out to make it fit

    @property
    def loss_tokens(self) -> int:
        """How many tokens the loss is taken on; the first token is never predicted."""
        return sum(self.trained[1:])


def made(
    line: int, tokens: Iterable[int], trained: Iterable[int], shortened: bool = False
) -> Sequence:
    """A sequence in little memory: four bytes a token and one for its mark."""
    return Sequence(line, array("i", tokens), bytes(trained), shortened)


def spans_of(trained: Values[int]) -> tuple[tuple[int, int], ...]:
    """The runs of trained tokens, as [start, end)."""
    spans, start = list[tuple[int, int]](), None
    for i, on in enumerate([*trained, False]):
        if on and start is None:
            start = i
        elif not on and start is not None:
            spans.append((start, i))
            start = None
    return tuple(spans)


class Renderer:
    """Renders examples with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401
        self.tokenizer = tokenizer
        self.guard = Guard(tokenizer)
        self.template = Template(tokenizer) if tokenizer.chat_template else None
        self.control: dict[int, Counter[str]] = {}  # by line: control tokens in its text

    def render(self, example: Example, longest: int) -> Sequence | None:
        """The example in at most `longest` tokens: the oldest exchanges go first.

        None when even the last exchange does not fit. Failure when the template
        does not take it, or does not show what is to be learned.
        """
        if example.messages[0].role == "text":
            return self._document(example, longest)
        messages, tools = self._guarded(example)
        whole = len(messages)
        while True:
            try:
                tokens, trained = self._tokens(messages, tools)
            except Unproven as e:
                raise Failure(
                    "plan_invalid",
                    f"line {example.line}: {e} the base model's chat template",
                    "Train on the last answer of each example alone, or choose a base model "
                    "whose chat template marks the assistant's text.",
                ) from None
            except Refused as e:
                raise Failure(
                    "dataset_invalid",
                    f"line {example.line} is refused by the base model's chat template: {e}",
                    "Change this line and those like it, or choose another base model.",
                ) from None
            if len(tokens) <= longest:
                return made(example.line, tokens, trained, len(messages) < whole)
            shorter = _without_oldest(messages)
            if shorter is None:
                return None
            messages = shorter

    def decode(self, sequence: Sequence) -> str:
        """The text of a sequence with marks around what is trained on."""
        out, inside, run = [], False, list[int]()
        for token, trained in zip(sequence.tokens, sequence.trained, strict=True):
            if bool(trained) != inside:
                out += [self.tokenizer.decode(run), OPEN if trained else CLOSE]
                inside, run = bool(trained), []
            run.append(token)
        return "".join([*out, self.tokenizer.decode(run), CLOSE if inside else ""])

    def _guarded(self, example: Example) -> tuple[list[Message], Tools]:
        """The messages and tools, with the user's control tokens hidden."""
        tools = list(example.tools) or None
        texts = [(m.content, m.calls, m.name) for m in example.messages]
        seen = self.guard.seen([texts, tools or []])
        messages = list(example.messages)
        if not seen:
            return messages, tools
        self.control[example.line] = seen
        hide = self.guard.hide
        return [
            replace(m, content=hide(m.content), calls=hide(m.calls), name=hide(m.name))
            for m in messages
        ], hide(tools)

    def _tokens(self, messages: list[Message], tools: Tools) -> tuple[list[int], list[bool]]:
        if self.template is None:
            return self._plain(messages, tools)
        if not self.template.takes_system and messages[0].role == "system":
            messages = _folded(messages)
        text, spans = self.template.spans(messages, tools)
        tokens, offsets = self.guard.encode(text)
        trained, places = [False] * len(tokens), iter(sorted(spans))
        span = next(places, None)
        for n, (start, end) in enumerate(offsets):
            while span and span[1] <= start:
                span = next(places, None)
            if span is None:
                break
            # A token that begins before the answer belongs to it if only by a space.
            trained[n] = span[0] < end > start and not text[start : span[0]].strip()
        return tokens, trained

    def _document(self, example: Example, longest: int) -> Sequence:
        """A document as it stands, with no template around it, cut at the end."""
        ids = self.tokenizer(example.messages[0].content, add_special_tokens=False)["input_ids"]
        ends = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        first, last = ([] if i is None else [i] for i in ends)
        whole = [*first, *ids, *last]
        tokens = whole[:longest]
        return made(example.line, tokens, [True] * len(tokens), len(tokens) < len(whole))

    def _plain(self, messages: list[Message], tools: Tools) -> tuple[list[int], list[bool]]:
        tokens: list[int] = []
        trained: list[bool] = []

        def add(text: str, learn: bool) -> None:
            ids, _ = self.guard.encode(text)
            tokens.extend(ids)
            trained.extend([learn] * len(ids))

        if tools:
            add(f"### Tools:\n{json.dumps(tools, ensure_ascii=False)}\n\n", False)
        for m in messages:
            add(f"### {m.role.capitalize()}:\n", False)
            add(m.content, m.trained)
            for call in m.calls:
                add(json.dumps(call["function"], ensure_ascii=False), m.trained)
            if m.role == "assistant" and self.tokenizer.eos_token_id is not None:
                tokens.append(self.tokenizer.eos_token_id)
                trained.append(m.trained)
            add("\n\n", False)
        return tokens, trained


def _folded(messages: list[Message]) -> list[Message]:
    """The system prompt at the head of the first question, for templates without a place for it."""
    system, *rest = messages
    if not rest or rest[0].role != "user":
        return messages
    return [replace(rest[0], content=f"{system.content}\n\n{rest[0].content}"), *rest[1:]]


def _without_oldest(messages: list[Message]) -> list[Message] | None:
    """The messages without their oldest exchange; the system prompt and the last one stay."""
    head = 1 if messages[0].role == "system" else 0
    users = [i for i, m in enumerate(messages) if m.role == "user" and i > head]
    if not users:
        return None
    shorter = messages[:head] + messages[users[0] :]
    if not any(m.trained for m in shorter):
        return None
    return shorter
