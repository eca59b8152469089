"""Where the assistant's text stands in what a chat template makes of a conversation.

A template is a program: it may trim texts, drop old thoughts, write headers of
its own. So a place is believed only with a proof. Markers of the template
itself are one. Else the answers are exchanged for words that stand nowhere
else, and the text with the answers put back in must be the true rendering,
character by character. An answer that is no plain text stands between its
prompt and what follows such a word. What none of these proves is refused:
nothing is ever trained on by accident, and no answer is without its end.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from lora_train.data import Message
from lora_train.failure import one_line

Tools = list[dict[str, Any]] | None
Span = tuple[int, int]

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
WORD = "Xq7{}Zv"  # survives trimming, and no template asks for it
MOST_SAID = 200  # characters of a template's complaint


class Refused(Exception):
    """The template does not take a conversation, in its own words."""


class Unproven(Exception):
    """It cannot be told what of a conversation the assistant says."""


class Template:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        ends = {t.content for t in added} | {tokenizer.eos_token or ""}
        names = "|".join(re.escape(t) for t in sorted(ends, key=lambda t: (-len(t), t)) if t)
        self._follows = re.compile(rf"\s*(?:{names})") if names else None
        self._closes = re.compile(rf"(?:{names})\s*\Z") if names else None
        self.takes_system = self._takes_system()

    def _takes_system(self) -> bool:
        """Whether a system prompt is shown, and not refused or left out."""
        ask, system = Message("user", "Hello"), Message("system", WORD.format(0))
        try:
            return WORD.format(0) in self.text([system, ask], None)
        except Refused:
            pass
        try:
            self.text([ask], None)
        except Refused:
            return True  # it takes nothing; the conversation itself will tell why
        return False

    def text(self, messages: list[Message], tools: Tools, prompt: bool = False) -> str:
        """What the template makes of a conversation; Refused when it does not take it."""
        return self._render(messages, tools, prompt, False)[0]

    def spans(self, messages: list[Message], tools: Tools) -> tuple[str, list[Span]]:
        """The rendered conversation, and where in it the trained answers stand.

        Unproven when that cannot be told, Refused when it takes no such conversation.
        """
        if MARKED.search(self.tokenizer.get_chat_template(tools=tools)):
            return self._marked(messages, tools)
        whole = self.text(messages, tools)
        found = self._by_words(messages, tools, whole)
        spans = []
        for i, m in enumerate(messages):
            if not m.trained:
                continue
            span = found.get(i) or self._by_surroundings(messages, tools, whole, i)
            if span is None:
                raise Unproven("the assistant's text cannot be found in")
            spans.append(span)
        return whole, spans

    def _render(
        self, messages: list[Message], tools: Tools, prompt: bool, marks: bool
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            made: Any = render_jinja_template(
                [[_plain(m) for m in messages]],
                tools=tools,  # pyright: ignore[reportArgumentType]
                chat_template=self.tokenizer.get_chat_template(tools=tools),
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as e:
            raise Refused(one_line(str(e))[:MOST_SAID]) from None
        texts, places = made
        return texts[0], list(places[0]) if marks else []

    def _marked(self, messages: list[Message], tools: Tools) -> tuple[str, list[Span]]:
        whole, places = self._render(messages, tools, False, True)
        answers = [m for m in messages if m.role == "assistant"]
        if len(places) != len(answers):
            raise Unproven("not every answer is marked in")
        return whole, [
            (start, self._closed(whole, start, end))
            for (start, end), m in zip(places, answers, strict=True)
            if m.trained
        ]

    def _by_words(self, messages: list[Message], tools: Tools, whole: str) -> dict[int, Span]:
        """Places of answers, proven by rendering other words in their stead."""
        asked = [
            i for i, m in enumerate(messages) if m.trained and not m.calls and m.content.strip()
        ]
        if not asked or WORD.split("{")[0] in whole:
            return {}
        words = {i: WORD.format(n) for n, i in enumerate(asked)}
        others = [replace(m, content=words.get(i, m.content)) for i, m in enumerate(messages)]
        try:
            parts = re.split("|".join(words.values()), self.text(others, tools))
        except Refused:
            return {}
        if len(parts) != len(asked) + 1:
            return {}
        found, at = dict[int, Span](), len(parts[0])
        for i, after in zip(asked, parts[1:], strict=True):
            text = next(
                (t for t in _trimmed(messages[i].content) if whole.startswith(t + after, at)), None
            )
            if text is None:
                return {}
            found[i] = at, at + len(text)
            at += len(text) + len(after)
        rebuilt = parts[0] + "".join(
            whole[a:b] + after for (a, b), after in zip(found.values(), parts[1:], strict=True)
        )
        if rebuilt != whole:
            return {}
        out = dict[int, Span]()
        for i, (start, end) in found.items():
            if (closed := self._end(whole, end)) is None:
                raise Unproven("the end of an answer is not marked in")
            # A header between prompt and text is the model's to write as well.
            before = self._prompt(messages[:i], tools)
            starts = before is not None and len(before) <= start and whole.startswith(before)
            out[i] = len(before) if before is not None and starts else start, closed
        return out

    def _by_surroundings(
        self, messages: list[Message], tools: Tools, whole: str, i: int
    ) -> Span | None:
        """The place of an answer that is no plain text, a call of tools or thoughts.

        It is what stands between the prompt and that which follows another answer.
        """
        m, word = messages[i], WORD.format(0)
        other = replace(m, content=word, calls=())
        before = self._prompt(messages[:i], tools)
        try:
            parts = self.text([*messages[:i], other, *messages[i + 1 :]], tools).split(word)
        except Refused:
            return None
        if before is None or len(parts) != 2:
            return None
        end = len(whole) - len(parts[1])
        if not (whole.startswith(before) and whole.endswith(parts[1]) and len(before) < end):
            return None
        shown = _squeezed(whole[len(before) : end])
        wanted = [m.content, *(c["function"]["name"] for c in m.calls)]
        closed = self._end(whole, end)
        if closed is None or not all(_squeezed(w) in shown for w in wanted):
            return None
        return len(before), closed

    def _prompt(self, messages: list[Message], tools: Tools) -> str | None:
        try:
            return self.text(messages, tools, True) if messages else None
        except Refused:
            return None

    def _end(self, whole: str, end: int) -> int | None:
        """After the token that ends the turn, None when none follows."""
        found = self._follows.match(whole, end) if self._follows else None
        return found.end() if found else None

    def _closed(self, whole: str, start: int, end: int) -> int:
        """The end of a marked answer: one that is left to the next turn is never learned."""
        if self._closes and self._closes.search(whole, max(start, end - MOST_SAID), end):
            return end
        return self._end(whole, end) or end


def _trimmed(text: str) -> list[str]:
    """What templates make of a text, the longest first."""
    return sorted(
        {text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n")},
        key=lambda t: (-len(t), t),
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _plain(m: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": m.role, "content": m.content}
    if m.calls:
        plain["tool_calls"] = list(m.calls)
    if m.call_id:
        plain["tool_call_id"] = m.call_id
    if m.name:
        plain["name"] = m.name
    return plain
