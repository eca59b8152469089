"""The data file: three formats of JSON Lines, checked line by line.

Every format becomes the same thing: an `Example`, messages of which some are
trained on. Errors name the line and what to change, up to twenty at once, and
never repeat the user's text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_train.failure import Failure

MOST_ERRORS = 20
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Message:
    """One message; `trained` marks the assistant's text that the loss is taken on."""

    role: str
    content: str
    trained: bool = False


@dataclass(frozen=True)
class Example:
    """One training example. Examples of one group never stand on both sides of a split."""

    line: int
    group: str
    messages: tuple[Message, ...]


class _Bad(Exception):
    """What is wrong with one line, in words for the user."""


def read(path: Path, sha256: str, check: Callable[[], None] = lambda: None) -> list[Example]:
    """All examples of a file, in its order; Failure dataset_invalid names what is wrong."""
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise Failure("input_missing", f"{path.name} is not the file that the plan names")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise Failure(
            "dataset_invalid",
            f"the file is not text in UTF-8 (first bad byte at position {e.start})",
            "Save the file as UTF-8 JSON Lines and upload it again.",
        ) from None
    if "\x00" in text[:4096]:
        raise Failure("dataset_invalid", "the file is binary, not JSON Lines")
    examples, errors, seen = _lines(text, check)
    if errors:
        more = f"; and {len(errors) - MOST_ERRORS} more" if len(errors) > MOST_ERRORS else ""
        raise Failure("dataset_invalid", "; ".join(errors[:MOST_ERRORS]) + more)
    if not seen:
        raise Failure("dataset_invalid", "the file is empty: it needs one example a line")
    if not examples:
        raise Failure("dataset_invalid", "the file has no example, only its _meta line")
    return examples


def _lines(text: str, check: Callable[[], None]) -> tuple[list[Example], list[str], bool]:
    examples: list[Example] = []
    errors: list[str] = []
    first_format, seen = "", False
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if number % 256 == 0:
            check()
        try:
            row = _object(line)
            if "_meta" in row and not seen:
                seen = True
                continue
            seen = True
            kind = _format(row)
            first_format = first_format or kind
            if kind != first_format:
                raise _Bad(f"is in format {kind}, the lines before it in {first_format}: use one")
            examples.append(READERS[kind](row, number))
        except _Bad as e:
            seen = True
            errors.append(f"line {number} {e}")
    return examples, errors, seen


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        where = f" (column {e.colno})" if isinstance(e, json.JSONDecodeError) else ""
        raise _Bad(f"is not JSON{where}") from None
    if not isinstance(row, dict):
        raise _Bad("is not a JSON object")
    return row


def _format(row: dict[str, Any]) -> str:
    if "target_response" in row or "current_user_input" in row:
        return "brightrun"
    if "turns" in row:
        return "turns"
    if "messages" in row:
        return "chat"
    raise _Bad(
        "has none of the known forms: it needs `target_response` (house format), `turns` or "
        "`messages`"
    )


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _Bad(f"lacks the text `{key}`")
    return value


def _message(entry: object, key: str, place: int) -> Message:
    if not isinstance(entry, dict):
        raise _Bad(f"has an entry in `{key}` that is not an object (entry {place})")
    role = ROLES.get(str(entry.get("role")))
    if role is None:
        raise _Bad(f"has an unknown role in `{key}` (entry {place}): use system, user, assistant")
    content = entry.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and "text" in p for p in content):
        content = "".join(str(p["text"]) for p in content)
    if not isinstance(content, str):
        raise _Bad(f"has an entry without text in `{key}` (entry {place})")
    weight = entry.get("weight", 1)
    if weight not in (0, 1):
        raise _Bad(f"has a weight that is neither 0 nor 1 in `{key}` (entry {place})")
    return Message(role, content, role == "assistant" and weight == 1)


def _messages(row: dict[str, Any], key: str) -> list[Message]:
    entries = row.get(key)
    if not isinstance(entries, list):
        raise _Bad(f"has `{key}` that is not a list")
    return [_message(e, key, i) for i, e in enumerate(entries, 1)]


def _trainable(messages: list[Message]) -> tuple[Message, ...]:
    if not any(m.trained and m.content.strip() for m in messages):
        raise _Bad("has no assistant text to train on: add an answer")
    return tuple(messages)


def _brightrun(row: dict[str, Any], line: int) -> Example:
    history = _messages(row, "conversation_history") if "conversation_history" in row else []
    question, answer = _text(row, "current_user_input"), _text(row, "target_response")
    if not answer.strip():
        raise _Bad("has an empty `target_response`: add an answer")
    # Real files repeat the question as the last entry of the history. Asking it
    # twice would teach the model to expect an echo.
    if history and history[-1].role == "user" and history[-1].content == question:
        history.pop()
    messages = [Message(m.role, m.content) for m in history]
    system = row.get("system_prompt")
    if isinstance(system, str) and system.strip():
        messages.insert(0, Message("system", system))
    messages += [Message("user", question), Message("assistant", answer, trained=True)]
    return Example(line, str(row.get("conversation_id") or f"line {line}"), tuple(messages))


def _turns(row: dict[str, Any], line: int) -> Example:
    messages = _trainable(_messages(row, "turns"))
    return Example(line, str(row.get("conversation_id") or f"line {line}"), messages)


def _chat(row: dict[str, Any], line: int) -> Example:
    messages = _trainable(_messages(row, "messages"))
    first = next((m.content for m in messages if m.role == "user"), f"line {line}")
    return Example(line, first, messages)


READERS: dict[str, Callable[[dict[str, Any], int], Example]] = {
    "brightrun": _brightrun,
    "turns": _turns,
    "chat": _chat,
}


def split(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples, split by group so that nothing leaks.

    Groups are ordered by a hash of their key; validation takes whole groups
    until it has its share. Fewer than five groups are not split.
    """
    groups = sorted(
        {e.group for e in examples},
        key=lambda g: hashlib.sha256(f"{seed}:{g}".encode()).digest(),
    )
    if fraction <= 0 or len(groups) < 5:
        return examples, []
    wanted, held, count = fraction * len(examples), set[str](), 0
    for group in groups[: len(groups) // 2]:
        held.add(group)
        count += sum(e.group == group for e in examples)
        if count >= wanted:
            break
    return (
        [e for e in examples if e.group not in held],
        [e for e in examples if e.group in held],
    )
