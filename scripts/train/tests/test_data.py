"""The data room: formats, errors in words, splits that do not leak."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, ROOT

from lora_train import data
from lora_train.failure import Failure


def read(path: Path) -> list[data.Example]:
    return data.read(path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_the_repeated_question_is_asked_once() -> None:
    rows = [json.loads(line) for line in DEMO.read_text().splitlines()[1:]]
    examples = read(DEMO)
    assert len(examples) == len(rows)
    for row, example in zip(rows, examples, strict=True):
        # The trap is there in every row, as in the app's real files.
        assert row["conversation_history"][-1]["content"] == row["current_user_input"]
        asked = [m for m in example.messages if m.content == row["current_user_input"]]
        assert len(asked) == 1
        assert [m.content for m in example.messages if m.trained] == [row["target_response"]]


def test_the_other_formats() -> None:
    turns, chat = read(ROOT / "testdata" / "turns.jsonl"), read(ROOT / "testdata" / "chat.jsonl")
    assert all(m.trained == (m.role == "assistant") for e in turns for m in e.messages)
    assert any(m.role == "assistant" and not m.trained for e in chat for m in e.messages)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b'{"_meta": {}}\n', "no example"),
        (b"\xff\xfe\x00\x01", "binary"),
        (b'{"messages": "\xff"}', "line 1 is not text in UTF-8"),
        (b'{"messages": []}\x00', "binary"),
        (b'{"messages": [{"role": "user", "content": "x"}]}\n', "line 1 has no assistant text"),
        (b'{"turns": [{"role": "user", "content": "x"}, {"role": "robot"}]}', "unknown role"),
        (b'{"turns": 3}', "line 1 has `turns` that is not a list"),
        (b"[1]\n", "line 1 is not a JSON object"),
        (b'{"x": 1}\n', "none of the known forms"),
        (b'{"current_user_input": "q", "target_response": " "}', "empty `target_response`"),
        (b'{"current_user_input": "q", "target_response": 3}', "lacks the text `target_response`"),
    ],
)
def test_bad_files_are_refused_in_words(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(Failure) as caught:
        read(path)
    assert caught.value.kind == "dataset_invalid"
    assert words in caught.value.message
    assert caught.value.hint


def test_one_bad_line_is_named_with_its_number(tmp_path: Path) -> None:
    lines = DEMO.read_text().splitlines()
    lines[3] = lines[3][:50]
    lines[7] = json.dumps({"turns": [{"role": "assistant", "content": "hi"}]})
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(Failure) as caught:
        read(path)
    assert "line 4 is not JSON" in caught.value.message
    assert "line 8 is in format turns" in caught.value.message


def test_a_conversation_never_stands_on_both_sides() -> None:
    examples = read(DEMO)
    train, held = data.split(examples, 0.2, seed=1)
    assert held and len(train) + len(held) == len(examples)
    assert not {e.group for e in train} & {e.group for e in held}
    assert data.split(examples, 0.2, seed=1) == (train, held)
    assert data.split(examples[:6], 0.2, seed=1) == (examples[:6], [])


CASES = ROOT.parent.parent / "internal" / "dataset" / "testdata" / "cases.json"


def content(case: dict[str, Any]) -> bytes:
    unit, times = case.get("unit", ""), case.get("times", 0)
    if case.get("numbered"):
        unit, times = "".join(unit.replace("#", str(i)) for i in range(times)), 1
    text = case.get("text", "") + case.get("head", "") + unit * times + case.get("tail", "")
    raw = text.encode()
    if "base64" in case:
        raw = base64.b64decode(case["base64"])
    return gzip.compress(raw) if case.get("gzip") else raw


def test_the_verdict_is_the_dispatchers() -> None:
    cases = json.loads(CASES.read_text())
    assert len(cases) >= 300
    different = []
    for case in cases:
        examples, problems = data.judge(content(case))
        got, want = [line for line, _ in problems], [line for line, _ in case["bad"]]
        if got != want or bool(examples or problems) is False:
            different.append((case["name"], got, want))
    assert not different


def test_what_the_dispatcher_writes_says_the_same() -> None:
    written = json.loads((CASES.parent / "normalised.json").read_text())
    cases = {case["name"]: case for case in json.loads(CASES.read_text())}
    assert len(written) >= 100
    for name, text in written.items():
        before, _ = data.judge(content(cases[name]))
        after, problems = data.judge(text.encode())
        assert not problems, name
        assert before == after, name


def test_the_split_is_as_the_dispatcher_foretells() -> None:
    """The figures of internal/dataset/dataset_test.go."""
    examples = read(DEMO)
    for fraction, seed, held in ((0.05, 42, 3), (0.2, 1, 9), (0.5, 7, 21), (0.0, 42, 0)):
        assert len(data.split(examples, fraction, seed)[1]) == held
