"""The data file: seven formats of JSON Lines, checked line by line.

Every format becomes the same thing: an `Example`, messages of which some are
trained on. Errors name the line and what to change, up to twenty at once, and
never repeat the user's text. The dispatcher's reader (internal/dataset) gives
the same verdict on every line; its testdata/cases.json holds both to it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_train.failure import Failure

MOST_ERRORS = 20
MOST_BYTES = 1 << 30  # of a file, after decompression
MOST_LINE_BYTES = 8 << 20
MOST_DEPTH = 64
MOST_MEMBERS = 10_000  # names of an object, messages of a line, parts of a message
HEAD_BYTES = 4096  # looked at to tell text from anything else
WHOLE_FILE = 0  # in place of a line number

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
SHARED_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Message:
    """One message; `trained` marks the assistant's text that the loss is taken on.

    The role `text` stands for a document that no template is put around.
    """

    role: str
    content: str
    trained: bool = False
    calls: tuple[dict[str, Any], ...] = ()  # of tools, arguments as objects
    call_id: str = ""  # that a tool's message answers
    name: str = ""


@dataclass(frozen=True)
class Example:
    """One training example. Examples of one group never stand on both sides of a split."""

    line: int
    group: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


class _Bad(Exception):
    """What is wrong with one line, in words for the user."""


def read(path: Path, sha256: str, check: Callable[[], None] = lambda: None) -> list[Example]:
    """All examples of a file, in its order; Failure dataset_invalid names what is wrong."""
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise Failure("input_missing", f"{path.name} is not the file that the plan names")
    # The dispatcher writes what it has judged in another form, which is longer
    # by a third at most: what passed there must not be too long here.
    examples, problems = judge(raw, check, longer=2)
    if problems:
        errors = [f"line {line} {text}" if line else text for line, text in problems]
        more = f"; and {len(errors) - MOST_ERRORS} more" if len(errors) > MOST_ERRORS else ""
        raise Failure("dataset_invalid", "; ".join(errors[:MOST_ERRORS]) + more)
    return examples


def judge(
    raw: bytes, check: Callable[[], None] = lambda: None, longer: int = 1
) -> tuple[list[Example], list[tuple[int, str]]]:
    """The examples of a file, and its problems by line; line 0 is the whole file.

    File and lines may be `longer` times as long as the usual limits.
    """
    examples: list[Example] = []
    problems: list[tuple[int, str]] = []
    try:
        raw = _decompressed(raw, longer * MOST_BYTES)
        if b"\x00" in raw[:HEAD_BYTES]:
            raise _Bad("the file is binary, not JSON Lines in UTF-8")
    except _Bad as e:
        return [], [(WHOLE_FILE, str(e))]
    first_format, seen = "", False
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if len(line) <= longer * MOST_LINE_BYTES and not line.strip(b" \t\r"):
            continue
        if number % 256 == 0:
            check()
        try:
            row = _row(line, longer * MOST_LINE_BYTES)
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
            problems.append((number, str(e)))
    if not seen:
        problems.append((WHOLE_FILE, "the file is empty: it needs one example a line"))
    elif not examples and not problems:
        problems.append((WHOLE_FILE, "the file has no example, only its _meta line"))
    return examples, problems


def _decompressed(raw: bytes, most: int) -> bytes:
    if raw[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as f:
                raw = f.read(most + 1)
        except (OSError, EOFError, zlib.error):
            raise _Bad("the compressed data is damaged or cut off") from None
    if len(raw) > most:
        raise _Bad(f"the file has more than {most >> 20} MiB")
    return raw


def _row(line: bytes, most: int) -> dict[str, Any]:
    if len(line) > most:
        raise _Bad(f"is longer than {most >> 20} MiB")
    try:
        text = line.decode()
    except UnicodeDecodeError as e:
        raise _Bad(f"is not text in UTF-8 (byte {e.start + 1})") from None
    row = _strict(text)
    if not isinstance(row, dict):
        raise _Bad("is not a JSON object")
    for key in LISTS:
        if isinstance(entries := row.get(key), list) and len(entries) > MOST_MEMBERS:
            raise _Bad(f"has more than {MOST_MEMBERS} entries in `{key}`")
    return row


def _strict(text: str) -> Any:  # noqa: ANN401
    """JSON that every parser understands, and in the same way."""
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse, parse_int=_whole)
    except (ValueError, RecursionError) as e:
        where = f" (column {e.colno})" if isinstance(e, json.JSONDecodeError) else ""
        raise _Bad(f"is not JSON{where}") from None
    # Only what could be too deep or hold half a character is walked through.
    if text.count("[") + text.count("{") > MOST_DEPTH or "\\ud" in text or "\\uD" in text:
        _walk(value)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_MEMBERS:
        raise _Bad(f"has more than {MOST_MEMBERS} names in one object")
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Bad("has the same name twice in one object")
    return made


def _refuse(_: str) -> None:
    raise _Bad("has a number that JSON does not allow")


def _whole(digits: str) -> int | float:
    # Python refuses to read integers of more than 4,300 digits.
    return int(digits) if len(digits) <= 18 else float(digits)


def _walk(value: object) -> None:
    rest: list[tuple[object, int]] = [(value, 1)]
    while rest:
        one, depth = rest.pop()
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                raise _Bad("has one half of a character (a lone surrogate)") from None
        elif isinstance(one, dict | list):
            if depth > MOST_DEPTH:
                raise _Bad(f"is nested deeper than {MOST_DEPTH} levels")
            inside = [*one, *one.values()] if isinstance(one, dict) else one
            rest.extend((v, depth + 1) for v in inside)


def _format(row: dict[str, Any]) -> str:
    for kind, names in FORMATS.items():
        if any(name in row for name in names):
            return kind
    raise _Bad(
        "has none of the known forms: it needs `target_response` (house format), `turns`, "
        "`messages`, `conversations`, `instruction`, `prompt` and `completion`, or `text`"
    )


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _Bad(f"lacks the text `{key}`")
    return value


def _answer(row: dict[str, Any], key: str) -> str:
    value = _text(row, key)
    if not value.strip():
        raise _Bad(f"has an empty `{key}`: add an answer")
    return value


def _group(row: dict[str, Any], line: int, first: str | None = None) -> str:
    """What keeps examples together: the conversation, else the user's first text."""
    key = row.get("conversation_id")
    if isinstance(key, str) and key:
        return key
    if type(key) is int and key != 0 and abs(key) < 10**15:
        return str(key)
    return f"line {line}" if first is None else first


def _asked(messages: tuple[Message, ...]) -> str | None:
    return next((m.content for m in messages if m.role == "user"), None)


def _content(entry: dict[str, Any]) -> str | None:
    content = entry.get("content")
    if isinstance(content, list):
        if len(content) > MOST_MEMBERS:
            return None
        texts = [p.get("text") if isinstance(p, dict) else None for p in content]
        if not all(isinstance(t, str) for t in texts):
            return None
        return "".join(str(t) for t in texts)
    return content if isinstance(content, str) else None


def _message(entry: object, key: str, place: int) -> Message:
    if not isinstance(entry, dict):
        raise _Bad(f"has an entry in `{key}` that is not an object (entry {place})")
    role = ROLES.get(str(entry.get("role")))
    if role is None:
        raise _Bad(
            f"has an unknown role in `{key}` (entry {place}): use system, user, assistant or tool"
        )
    calls = _calls(entry, role, f"`{key}` (entry {place})")
    content = _content(entry)
    if content is None and calls and entry.get("content") is None:
        content = ""
    if content is None:
        raise _Bad(f"has an entry without text in `{key}` (entry {place})")
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise _Bad(f"has a weight that is neither 0 nor 1 in `{key}` (entry {place})")
    of_tool = {}
    if role == "tool":
        named = {"call_id": entry.get("tool_call_id"), "name": entry.get("name")}
        of_tool = {k: v for k, v in named.items() if isinstance(v, str)}
    return Message(role, content, role == "assistant" and weight == 1, calls, **of_tool)


def _calls(entry: dict[str, Any], role: str, where: str) -> tuple[dict[str, Any], ...]:
    calls = entry.get("tool_calls")
    if calls is None or calls == []:
        return ()
    if not isinstance(calls, list) or role != "assistant":
        raise _Bad(f"has tool calls that cannot be used in {where}")
    return tuple(_call(call, where) for call in calls)


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(call, dict) and isinstance(function, dict):
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = _strict(arguments)
            except _Bad:
                arguments = None
        if isinstance(function.get("name"), str) and isinstance(arguments, dict):
            return {**call, "function": {**function, "arguments": arguments}}
    raise _Bad(f"has tool calls that cannot be used in {where}")


def _list(row: dict[str, Any], key: str) -> list[object]:
    entries = row.get(key)
    if not isinstance(entries, list):
        raise _Bad(f"has `{key}` that is not a list")
    return entries


def _messages(row: dict[str, Any], key: str) -> list[Message]:
    return [_message(e, key, i) for i, e in enumerate(_list(row, key), 1)]


def _trainable(messages: list[Message]) -> tuple[Message, ...]:
    if not any(m.trained and (m.calls or m.content.strip()) for m in messages):
        raise _Bad("has no assistant text to train on: add an answer")
    return tuple(messages)


def _brightrun(row: dict[str, Any], line: int) -> Example:
    history: list[Message] = []
    if row.get("conversation_history") is not None:
        history = _messages(row, "conversation_history")
    question, answer = _text(row, "current_user_input"), _answer(row, "target_response")
    # Real files repeat the question as the last entry of the history. Asking it
    # twice would teach the model to expect an echo.
    if history and history[-1].role == "user" and history[-1].content == question:
        history.pop()
    messages = [replace(m, trained=False) for m in history]
    system = row.get("system_prompt")
    if isinstance(system, str) and system.strip():
        messages.insert(0, Message("system", system))
    messages += [Message("user", question), Message("assistant", answer, trained=True)]
    return Example(line, _group(row, line), tuple(messages))


def _turns(row: dict[str, Any], line: int) -> Example:
    messages = _trainable(_messages(row, "turns"))
    return Example(line, _group(row, line), messages)


def _chat(row: dict[str, Any], line: int) -> Example:
    tools = row.get("tools")
    if tools is None:
        tools = []
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise _Bad("has `tools` that are not a list of objects")
    messages = _trainable(_messages(row, "messages"))
    return Example(line, _group(row, line, _asked(messages)), messages, tuple(tools))


def _system(row: dict[str, Any]) -> list[Message]:
    system = row.get("system")
    if system is None:
        return []
    return [Message("system", s)] if (s := _text(row, "system")).strip() else []


def _sharegpt(row: dict[str, Any], line: int) -> Example:
    messages = _system(row)
    for place, entry in enumerate(_list(row, "conversations"), 1):
        if not isinstance(entry, dict):
            raise _Bad(f"has an entry in `conversations` that is not an object (entry {place})")
        role = SHARED_ROLES.get(str(entry.get("from")))
        if role is None:
            raise _Bad(f"has an unknown `from` (entry {place}): use system, human, gpt or tool")
        if not isinstance(entry.get("value"), str):
            raise _Bad(f"has an entry without text in `conversations` (entry {place})")
        messages.append(Message(role, entry["value"], role == "assistant"))
    return _asked_example(row, line, _trainable(messages))


def _alpaca(row: dict[str, Any], line: int) -> Example:
    messages = _system(row)
    question = _text(row, "instruction")
    if row.get("input") is not None and (extra := _text(row, "input")).strip():
        question += "\n\n" + extra
    answer = Message("assistant", _answer(row, "output"), trained=True)
    return _asked_example(row, line, (*messages, Message("user", question), answer))


def _completion(row: dict[str, Any], line: int) -> Example:
    question = Message("user", _text(row, "prompt"))
    answer = Message("assistant", _answer(row, "completion"), trained=True)
    return _asked_example(row, line, (question, answer))


def _asked_example(row: dict[str, Any], line: int, messages: tuple[Message, ...]) -> Example:
    return Example(line, _group(row, line, _asked(messages)), messages)


def _document(row: dict[str, Any], line: int) -> Example:
    return Example(line, _group(row, line), (Message("text", _answer(row, "text"), trained=True),))


LISTS = ("conversation_history", "turns", "messages", "conversations", "tools")

# By which names a format is known; a line with those of several is the first.
FORMATS = {
    "brightrun": ("target_response", "current_user_input"),
    "turns": ("turns",),
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
READERS: dict[str, Callable[[dict[str, Any], int], Example]] = {
    "brightrun": _brightrun,
    "turns": _turns,
    "chat": _chat,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "completion": _completion,
    "text": _document,
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
