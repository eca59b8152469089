"""Messages to tokens, and which of them the loss is taken on.

The assistant's text is found by the template's own generation markers, by
proven prefixes of the rendered text, or, for a base model without a template,
by a plain role template of ours. When none can be proven the plan is refused:
nothing is ever trained on everything by accident.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Values
from dataclasses import dataclass
from typing import Any

from lora_train.data import Example, Message
from lora_train.failure import Failure

Tools = list[dict[str, Any]] | None

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
        template = tokenizer.chat_template
        if not template:
            self._render = self._plain
        elif "{% generation %}" in template or "{%- generation" in template:
            self._render = self._marked
        else:
            self._render = self._prefixes

    def render(self, example: Example, longest: int) -> Sequence | None:
        """The example in at most `longest` tokens: the oldest exchanges go first.

        None when even the last exchange does not fit.
        """
        messages = list(example.messages)
        if messages[0].role == "text":
            return self._document(example, longest)
        while True:
            tokens, trained = self._render(messages, list(example.tools) or None)
            if len(tokens) <= longest:
                whole = len(messages) == len(example.messages)
                return made(example.line, tokens, trained, not whole)
            shorter = _without_oldest(messages)
            if shorter is None:
                return None
            messages = shorter

    def decode(self, sequence: Sequence) -> str:
        """The text of a sequence with marks around what is trained on."""
        out, inside, run = [], False, list[int]()
        for token, trained in zip(sequence.tokens, sequence.trained, strict=True):
            if trained != inside:
                out += [self.tokenizer.decode(run), OPEN if trained else CLOSE]
                inside, run = trained, []
            run.append(token)
        return "".join([*out, self.tokenizer.decode(run), CLOSE if inside else ""])

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
            if not text:
                return
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
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

    def _marked(self, messages: list[Message], tools: Tools) -> tuple[list[int], list[bool]]:
        out = self.tokenizer.apply_chat_template(
            _plain_messages(messages),
            tools=tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens, mask = list(out["input_ids"]), [bool(x) for x in out["assistant_masks"]]
        spans = spans_of(mask)
        answers = [m for m in messages if m.role == "assistant"]
        if len(spans) != len(answers):
            raise Failure(
                "plan_invalid",
                "the base model's chat template does not mark every answer",
                "Choose a base model whose chat template marks the assistant's text.",
            )
        trained = [False] * len(tokens)
        for (start, end), m in zip(spans, answers, strict=True):
            trained[start:end] = [m.trained] * (end - start)
        return tokens, trained

    def _prefixes(self, messages: list[Message], tools: Tools) -> tuple[list[int], list[bool]]:
        plain = _plain_messages(messages)

        def text(upto: int, prompt: bool) -> str:
            return self.tokenizer.apply_chat_template(
                plain[:upto], tools=tools, tokenize=False, add_generation_prompt=prompt
            )

        whole = text(len(plain), False)
        spans = []
        for i, m in enumerate(messages):
            if m.role != "assistant":
                continue
            before, after = text(i, True), text(i + 1, False)
            if not (whole.startswith(after) and after.startswith(before) and m.content in after):
                raise Failure(
                    "plan_invalid",
                    "the assistant's text cannot be found in the base model's chat template",
                    "Choose a base model whose chat template marks the assistant's text.",
                )
            if m.trained:
                spans.append((len(before), len(after)))
        out = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        trained = [
            any(start >= a and end <= b and end > start for a, b in spans)
            for start, end in out["offset_mapping"]
        ]
        return list(out["input_ids"]), trained


def _plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    return [_plain_message(m) for m in messages]


def _plain_message(m: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": m.role, "content": m.content}
    if m.calls:
        plain["tool_calls"] = list(m.calls)
    if m.call_id:
        plain["tool_call_id"] = m.call_id
    if m.name:
        plain["name"] = m.name
    return plain


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
