"""Reads a data file into conversations, or says exactly which lines to change.

Three formats, one to a file: the house format v4, `turns`, and OpenAI
`messages`. All errors are collected (up to 20) before anything is refused.
Messages name lines and fields, never their content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_train.failure import Failure

MAX_ERRORS = 20
MAX_LINE = 10 << 20
MAX_VALIDATION = 1000
FEWEST_GROUPS = 10

KNOWN = (
    "system_prompt/conversation_history/current_user_input/target_response (house format v4), "
    "conversation_id/turns, or messages (OpenAI chat)"
)
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


class Invalid(Exception):
    """What is wrong with one line, in words that say what to change."""


@dataclass(frozen=True)
class Message:
    """One message; `train` marks assistant text that the loss is computed on."""

    role: str
    content: str
    train: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The form that chat templates read."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Example:
    """One training example: a conversation up to its last trained answer."""

    line: int
    group: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Dataset:
    """A whole data file."""

    format: str
    examples: tuple[Example, ...]
    sha256: str
    groups: int


def refuse(errors: list[tuple[int, str]]) -> Failure:
    """One Failure that names every error; line 0 is the file itself."""
    named = [f"line {n}: {what}" if n else what for n, what in errors[:MAX_ERRORS]]
    if len(errors) > MAX_ERRORS:
        named.append(f"only the first {MAX_ERRORS} errors are named")
    return Failure("dataset_invalid", "; ".join(named))


def read(path: Path, sha256: str, poll: Callable[[], None] = lambda: None) -> Dataset:
    """All examples of the file; Failure names every line that has to change.

    `sha256` is the digest that the file must have; `poll` is called for every
    line and may raise to leave early.
    """
    digest = hashlib.sha256()
    errors: list[tuple[int, str]] = []
    found: tuple[str, int] | None = None
    examples: list[Example] = []
    seen_content = False
    try:
        for number, raw in _lines(path, digest):
            poll()
            if len(errors) > MAX_ERRORS:
                continue  # only the digest still matters
            if not raw.strip():
                continue
            try:
                row = _object(raw, number)
                if "_meta" in row:
                    _check_meta(row, seen_content)
                    seen_content = True
                    continue
                seen_content = True
                name = _format(row)
                if found is None:
                    found = name, number
                if name != found[0]:
                    raise Invalid(
                        f"is in the format {name!r} but line {found[1]} is in {found[0]!r}: "
                        "use one format in the whole file"
                    )
                examples.append(CONVERTERS[name](row, number))
            except Invalid as e:
                errors.append((number, str(e)))
                if str(e).startswith("is not text"):
                    errors.append((0, "the rest was not read"))
                    break
    except FileNotFoundError:
        raise Failure("input_missing", f"the data file {path} is not there") from None
    except IsADirectoryError:
        raise Failure("input_missing", f"the data file {path} is a directory") from None
    whole = not any(n == 0 for n, _ in errors)
    if whole and digest.hexdigest() != sha256:
        raise Failure(
            "input_missing",
            f"the data file {path} has the digest {digest.hexdigest()}, the plan says {sha256}",
        )
    if not errors and not examples:
        errors.append((0, "the file has no training pairs: write one JSON object a line"))
    if errors:
        raise refuse(errors)
    name = found[0] if found else ""
    return Dataset(name, tuple(examples), digest.hexdigest(), len({e.group for e in examples}))


def _lines(path: Path, digest: hashlib._Hash) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as stream:
        number = 0
        while raw := stream.readline():
            number += 1
            digest.update(raw)
            yield number, raw


def _object(raw: bytes, number: int) -> dict[str, Any]:
    if number == 1:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    if b"\x00" in raw:
        raise Invalid("is not text (it holds zero bytes): upload a UTF-8 JSON Lines file")
    if len(raw) > MAX_LINE:
        raise Invalid(f"is longer than {MAX_LINE >> 20} MiB: split the conversation")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise Invalid(f"is not UTF-8 (byte {e.start + 1}): save the file as UTF-8") from None
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as e:
        raise Invalid(
            f"is not JSON ({e.msg} at column {e.colno}): write one whole JSON object a line"
        ) from None
    except (ValueError, RecursionError) as e:
        raise Invalid(f"is not JSON ({e}): write one whole JSON object a line") from None
    if not isinstance(value, dict):
        raise Invalid(f"is a JSON {_kind(value)}: write one JSON object a line")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "text", list: "list"}
    return names.get(type(value), "object")


def _check_meta(row: dict[str, Any], seen_content: bool) -> None:
    if seen_content:
        raise Invalid("is a second header: a line with _meta may only be the first")
    if not isinstance(row["_meta"], dict):
        raise Invalid("_meta must be an object")


def _format(row: dict[str, Any]) -> str:
    if "messages" in row:
        return "messages"
    if "turns" in row:
        return "turns"
    if "target_response" in row or "current_user_input" in row:
        return "brightrun_lora_v4"
    if "conversations" in row:
        raise Invalid("is in the ShareGPT format: rename conversations to messages, from/value to "
                      "role/content")  # fmt: skip
    if "instruction" in row:
        raise Invalid("is in the Alpaca format: write instruction and input as a user message and "
                      "output as an assistant message in messages")  # fmt: skip
    if "prompt" in row or "completion" in row:
        raise Invalid("is in the prompt/completion format: write the prompt as a user message and "
                      "the completion as an assistant message in messages")  # fmt: skip
    raise Invalid(f"has no known fields: use {KNOWN}")


def _string(row: dict[str, Any], key: str, where: str = "") -> str:
    name = f"{where}{key}"
    if key not in row:
        raise Invalid(f"{name} is missing: add it")
    value = row[key]
    if not isinstance(value, str):
        raise Invalid(f"{name} is a {_kind(value)}: make it a text")
    return _unbroken(value, name)


def _filled(row: dict[str, Any], key: str, where: str = "") -> str:
    value = _string(row, key, where)
    if not value.strip():
        raise Invalid(f"{where}{key} is empty: write its text or remove the line")
    return value


def _unbroken(value: str, name: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise Invalid(f"{name} holds half a character (a lone surrogate): correct the export")
    return value


def _house(row: dict[str, Any], number: int) -> Example:
    """One pair: the loss is on target_response only; earlier answers are other rows' targets."""
    messages = []
    system = row.get("system_prompt")
    if system is not None and _string(row, "system_prompt").strip():
        messages.append(Message("system", system))
    question = _filled(row, "current_user_input")
    answer = _filled(row, "target_response")
    history = row.get("conversation_history")
    if history is None:
        history = []
    if not isinstance(history, list):
        raise Invalid("conversation_history must be a list: make it one")
    past = []
    for i, entry in enumerate(history, 1):
        where = f"conversation_history entry {i}: "
        if not isinstance(entry, dict):
            raise Invalid(f"{where}it is a {_kind(entry)}: make it an object with role and content")
        role = _role(entry, where, ("system", "user", "assistant"))
        past.append(Message(role, _filled(entry, "content", where)))
    # The app's export repeats the question as the last entry; it is asked once.
    if past and past[-1].role == "user" and past[-1].content.strip() == question.strip():
        past.pop()
    messages += [*past, Message("user", question), Message("assistant", answer, train=True)]
    return Example(number, _group(row, messages), tuple(messages))


def _turns(row: dict[str, Any], number: int) -> Example:
    if "conversation_id" not in row:
        raise Invalid("conversation_id is missing: give every conversation an id")
    messages = _messages(row, "turns", ("system", "user", "assistant"))
    return Example(number, _group(row, messages), _ending_in_training(messages))


def _chat(row: dict[str, Any], number: int) -> Example:
    messages = _messages(row, "messages", tuple(ROLES))
    tools = row.get("tools")
    if tools is None:
        tools = []
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise Invalid("tools must be a list of objects: correct or remove it")
    return Example(number, _group(row, messages), _ending_in_training(messages), tuple(tools))


def _messages(row: dict[str, Any], key: str, roles: tuple[str, ...]) -> list[Message]:
    entries = row[key]
    if not isinstance(entries, list) or not entries:
        raise Invalid(f"{key} must be a list with at least one message: fill it")
    messages = []
    for i, entry in enumerate(entries, 1):
        where = f"{key} entry {i}: "
        if not isinstance(entry, dict):
            raise Invalid(f"{where}it is a {_kind(entry)}: make it an object with role and content")
        messages.append(_message(entry, where, roles))
    return messages


def _message(entry: dict[str, Any], where: str, roles: tuple[str, ...]) -> Message:
    role = _role(entry, where, roles)
    extra: dict[str, Any] = {}
    calls = entry.get("tool_calls")
    if calls is not None and role == "assistant":
        if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
            raise Invalid(f"{where}tool_calls must be a list of objects: correct it")
        extra["tool_calls"] = [_call(c) for c in calls]
    for name in ("tool_call_id", "name"):
        if isinstance(entry.get(name), str):
            extra[name] = entry[name]
    content = _content(entry, where, may_be_empty=bool(calls) or role in ("tool", "system"))
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise Invalid(f"{where}weight is neither 0 nor 1: make it one of them")
    return Message(role, content, role == "assistant" and weight == 1, extra)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, which is what templates expect."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        raise Invalid("the arguments of a tool call are not JSON: correct them") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _role(entry: dict[str, Any], where: str, roles: tuple[str, ...]) -> str:
    role = _string(entry, "role", where)
    if role not in roles:
        raise Invalid(f"{where}the role is unknown: use one of {', '.join(roles)}")
    return ROLES[role]


def _content(entry: dict[str, Any], where: str, *, may_be_empty: bool) -> str:
    content = entry.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise Invalid(f"{where}only text parts can be trained on: remove the others")
            parts.append(_string(part, "text", where))
        entry = {**entry, "content": "".join(parts)}
    if content is None and may_be_empty:
        return ""
    return _string(entry, "content", where) if may_be_empty else _filled(entry, "content", where)


def _ending_in_training(messages: list[Message]) -> tuple[Message, ...]:
    """Without what follows the last trained answer: nothing can be learned from it."""
    last = max((i for i, m in enumerate(messages) if m.train), default=None)
    if last is None:
        raise Invalid("has no assistant text to learn from: add an assistant message")
    return tuple(messages[: last + 1])


def _group(row: dict[str, Any], messages: list[Message]) -> str:
    """What keeps pairs of one conversation on one side of the split."""
    name = row.get("conversation_id")
    if name is not None:
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise Invalid("conversation_id must be a text or a whole number: correct it")
        return f"id:{name}"
    first = next((m.content for m in messages if m.role == "user"), messages[0].content)
    return "text:" + " ".join(first.lower().split())


CONVERTERS: dict[str, Callable[[dict[str, Any], int], Example]] = {
    "brightrun_lora_v4": _house,
    "turns": _turns,
    "messages": _chat,
}


def split(
    examples: tuple[Example, ...], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples; a conversation is never on both sides.

    Conversations are taken in the order of their hash. With fewer than
    FEWEST_GROUPS of them, or a fraction of 0, there is no validation.
    """
    groups: dict[str, int] = {}
    for e in examples:
        groups[e.group] = groups.get(e.group, 0) + 1
    if fraction <= 0 or len(groups) < FEWEST_GROUPS:
        return list(examples), []
    wanted = max(1, round(fraction * len(groups)))
    chosen: set[str] = set()
    count = 0
    by_hash = sorted(groups, key=lambda g: hashlib.sha256(f"split:{seed}:{g}".encode()).digest())
    for group in by_hash[:wanted]:
        if chosen and count + groups[group] > MAX_VALIDATION:
            break
        chosen.add(group)
        count += groups[group]
    return (
        [e for e in examples if e.group not in chosen],
        [e for e in examples if e.group in chosen],
    )
