"""Turns conversations into tokens and marks the ones that are learned.

The loss is on assistant text and the token that ends it, and on nothing else.
Where that text stands is known in one of two ways: the chat template marks it
with {% generation %}, or it is proved by rendering the conversation again
with stand-ins for the answers. A tokenizer without a template gets a plain
one of ours. Tokens are never added to a vocabulary.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_train.data import Example, Message, refuse
from lora_train.failure import Failure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Marked, so that it takes the same way as everybody else's. The end token is in the mark:
# without it the model would never learn to stop.
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}"
    "Assistant: {% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}\n\n"
    "{% elif m['role'] == 'user' %}User: {{ m['content'] }}\n\n"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% else %}{{ raise_exception('only system, user and assistant can be rendered') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
MAX_DROPPED = 0.05

Span = tuple[int, int]


class Unrenderable(Exception):
    """A conversation that the template cannot render or whose answers cannot be found."""


@dataclass(frozen=True)
class Sequence:
    """One tokenized example; `trained[i]` says whether token i is learned."""

    line: int
    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def loss_tokens(self) -> int:
        """Learned tokens that have a token before them to be predicted from."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class Tokenized:
    """All sequences, and what had to be done to make them fit."""

    sequences: tuple[Sequence, ...]
    shortened: int
    dropped: tuple[int, ...]
    control_lines: tuple[int, ...]


class Renderer:
    """Renders and tokenizes with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.plain = not tokenizer.chat_template
        if self.plain:
            if not tokenizer.eos_token:
                raise Failure(
                    "plan_invalid",
                    "the base model's tokenizer has neither a chat template nor an end token",
                    "Choose a base model that has an end-of-text token.",
                )
            # Set on the tokenizer, and so exported: whoever serves the adapter needs it.
            tokenizer.chat_template = _bos(tokenizer) + PLAIN_TEMPLATE
        template: Any = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not isinstance(template, str):
            raise Failure("plan_invalid", "the base model has no default chat template")
        self.template = template
        self.marked = MARK.search(template) is not None
        self.knows_tools = "tool" in template
        added = tokenizer.added_tokens_decoder.values()
        self.specials = {t.content for t in added if t.special and t.content.strip()}
        self.controls = re.compile("|".join(re.escape(s) for s in sorted(self.specials)) or "(?!)")

    def tokenize(
        self, examples: list[Example], max_length: int, poll: Callable[[], None]
    ) -> Tokenized:
        """All examples as tokens, at most max_length each.

        Too long conversations lose their oldest messages first, never the
        system prompt or the last answer. What is still too long is dropped;
        more than a twentieth dropped refuses the file.
        """
        errors: list[tuple[int, str]] = []
        sequences, dropped, control_lines = [], [], []
        shortened = 0
        for e in examples:
            poll()
            try:
                found, cuts = self._fit(e, max_length)
            except Unrenderable as problem:
                errors.append((e.line, str(problem)))
                continue
            if any(self.controls.search(m.content) for m in e.messages):
                control_lines.append(e.line)
            if found is None:
                dropped.append(e.line)
                continue
            shortened += cuts > 0
            sequences.append(found)
        if errors:
            raise refuse(errors)
        if len(dropped) > MAX_DROPPED * len(examples):
            named = ", ".join(str(n) for n in dropped[:20])
            raise Failure(
                "dataset_invalid",
                f"{len(dropped)} of {len(examples)} pairs have a question and answer longer than "
                f"{max_length} tokens (lines {named}): shorten them or raise max_seq_length",
                "Raise max_seq_length, or shorten the named answers or their system prompt.",
            )
        return Tokenized(tuple(sequences), shortened, tuple(dropped), tuple(control_lines))

    def _fit(self, example: Example, max_length: int) -> tuple[Sequence | None, int]:
        cuts = 0
        while True:
            found = self.sequence(example)
            if len(found.ids) <= max_length:
                return (found if found.loss_tokens else None), cuts
            shorter = _without_oldest(example)
            if shorter is None:
                return None, cuts
            example, cuts = shorter, cuts + 1

    def sequence(self, example: Example) -> Sequence:
        """One example as tokens; Unrenderable when its answers cannot be found."""
        if example.tools or any(m.role == "tool" or "tool_calls" in m.extra
                                for m in example.messages):  # fmt: skip
            if not self.knows_tools:
                raise Unrenderable(
                    "uses tools, which the base model's chat template does not know: "
                    "remove tools and tool calls or choose another base model"
                )
        safe, controls = self._hide_controls(example)
        text, spans = self._spans(safe)
        return self._encode(example.line, text, spans, controls)

    def _hide_controls(self, example: Example) -> tuple[Example, dict[str, str]]:
        """Control tokens in what people wrote become stand-ins, so that they stay plain text."""
        if not any(self.controls.search(m.content) for m in example.messages):
            return example, {}
        names: dict[str, str] = {}

        def hide(match: re.Match[str]) -> str:
            name = names.setdefault(match[0], f"\ue000{len(names)}\ue001")
            return name

        messages = tuple(
            replace(m, content=self.controls.sub(hide, m.content)) for m in example.messages
        )
        return replace(example, messages=messages), {v: k for k, v in names.items()}

    def _spans(self, example: Example) -> tuple[str, list[Span]]:
        """The rendered text and where its learned parts stand, in characters."""
        if self.marked:
            return self._marked_spans(example)
        try:
            return self._proved_spans(example)
        except Unrenderable:
            stripped = tuple(replace(m, content=m.content.strip()) for m in example.messages)
            return self._proved_spans(replace(example, messages=stripped))

    def _render(self, messages: tuple[Message, ...], tools: Any) -> tuple[str, list[Span]]:  # noqa: ANN401
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        special = {k: v for k, v in self.tokenizer.special_tokens_map.items() if isinstance(v, str)}
        try:
            texts, spans = render_jinja_template(
                conversations=[[m.plain() for m in messages]],
                tools=list(tools) or None,
                chat_template=self.template,
                return_assistant_tokens_mask=self.marked,
                **special,
            )
        except (TemplateError, TypeError, ValueError) as e:
            raise Unrenderable(
                f"the base model's chat template refuses the conversation ({e}): "
                "check the order of its roles"
            ) from None
        return texts[0], list(spans[0]) if spans else []

    def _marked_spans(self, example: Example) -> tuple[str, list[Span]]:
        text, spans = self._render(example.messages, example.tools)
        answers = [m for m in example.messages if m.role == "assistant"]
        if len(spans) != len(answers):
            raise Unrenderable(
                f"the chat template marks {len(spans)} answers, the conversation has "
                f"{len(answers)}: check the order of its roles"
            )
        learned = [s for s, m in zip(spans, answers, strict=True) if m.train]
        for start, end in learned:
            if end <= start:
                raise Unrenderable("the chat template renders an answer as nothing")
        return text, learned

    def _proved_spans(self, example: Example) -> tuple[str, list[Span]]:
        """Find answers by stand-ins, and prove them by putting the answers back."""
        text, _ = self._render(example.messages, example.tools)
        tag = uuid.uuid5(uuid.NAMESPACE_OID, text).hex
        names: dict[str, Message] = {}
        stood_in = []
        for i, m in enumerate(example.messages):
            if m.train and m.content:
                name = f"STANDIN{tag}N{i}X"
                names[name] = m
                m = replace(m, content=name)
            elif m.train:
                raise Unrenderable(
                    "has a tool call to learn, and the chat template does not mark answers: "
                    "remove it or give it weight 0"
                )
            stood_in.append(m)
        other, _ = self._render(tuple(stood_in), example.tools)
        if any(other.count(name) != 1 for name in names):
            raise Unrenderable("the chat template does not show every answer exactly once")
        spans, built, last = [], "", 0
        for name in sorted(names, key=other.index):
            at = other.index(name)
            built += other[last:at]
            start = len(built)
            built += names[name].content
            last = at + len(name)
            end = len(built) + self._end_token(other[last:])
            spans.append((start, end))
        if built + other[last:] != text:
            raise Unrenderable("the chat template changes an answer, so it cannot be found again")
        return text, spans

    def _end_token(self, rest: str) -> int:
        """The length of the token that ends an answer, with the space before it."""
        gap = len(rest) - len(rest.lstrip())
        match = self.controls.match(rest, gap)
        if match is None:
            raise Unrenderable("the chat template ends an answer without a token of its own")
        return match.end()

    def _encode(
        self, line: int, text: str, spans: list[Span], controls: dict[str, str]
    ) -> Sequence:
        ids: list[int] = []
        trained: list[bool] = []
        pieces = re.split("(" + "|".join(controls) + ")", text) if controls else [text]
        offset = 0
        for piece in pieces:
            plain = controls.get(piece)
            said = self.tokenizer(
                plain or piece,
                add_special_tokens=False,
                return_offsets_mapping=True,
                split_special_tokens=plain is not None,
                verbose=False,
            )
            ids += said["input_ids"]
            for start, end in said["offset_mapping"]:
                inner = (0, 1) if plain is not None else (start, end)
                trained.append(_inside(offset + inner[0], offset + inner[1], spans))
            offset += len(piece)
        return Sequence(line, tuple(ids), tuple(trained))

    def show(self, sequence: Sequence, limit: int = 6000) -> str:
        """The decoded example with «…» around what is learned."""
        out, at = [], 0
        while at < len(sequence.ids):
            end = at
            while end < len(sequence.ids) and sequence.trained[end] == sequence.trained[at]:
                end += 1
            text = str(self.tokenizer.decode(list(sequence.ids[at:end])))
            out.append(f"«{text}»" if sequence.trained[at] else text)
            at = end
        whole = "".join(out)
        if len(whole) <= limit:
            return whole
        return whole[: limit // 2] + "\n[…]\n" + whole[-limit // 2 :]


def _inside(start: int, end: int, spans: list[Span]) -> bool:
    """A token is learned when most of it stands in an answer."""
    shared = sum(max(0, min(end, e) - max(start, s)) for s, e in spans)
    return 2 * shared > end - start


def _without_oldest(example: Example) -> Example | None:
    """The conversation without its oldest exchange; None when only the last one is left."""
    messages = list(example.messages)
    first = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    last_user = max((i for i, m in enumerate(messages) if m.role == "user"), default=first)
    if first >= last_user:
        return None
    del messages[first]
    while first < last_user - 1 and messages[first].role != "user":
        del messages[first]
        last_user -= 1
    if not any(m.train for m in messages):
        return None
    return replace(example, messages=tuple(messages))


def _bos(tokenizer: PreTrainedTokenizerFast) -> str:
    ids = tokenizer("a")["input_ids"]
    starts = tokenizer.bos_token_id is not None and ids and ids[0] == tokenizer.bos_token_id
    return "{{ bos_token }}" if starts else ""
