"""Rows of one conversation cost one pass, and teach what they taught alone."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, make_plan
from test_packing import SMALL, forward_of
from transformers import AutoTokenizer, LlamaConfig

from lora_train import conversation, data, plan, prepare, render, schedule
from lora_train.failure import Failure


@pytest.fixture(scope="module")
def renderer(model: Path) -> render.Renderer:
    return render.Renderer(AutoTokenizer.from_pretrained(model, local_files_only=True))


def demo() -> list[data.Example]:
    return data.read(DEMO, hashlib.sha256(DEMO.read_bytes()).hexdigest())


def prepared(renderer: render.Renderer, examples: list[data.Example], **over: Any) -> Any:
    longest = over.pop("longest", 1 << 20)
    raw = make_plan(Path("/run"), DEMO, Path("/model"))
    one = plan.parse({**raw, "data": {**raw["data"], **over}})
    return prepare.prepare(one, examples, renderer, longest)


def test_losses_and_gradients_are_those_of_the_rows(renderer: render.Renderer) -> None:
    vocabulary = len(renderer.tokenizer)
    forward = forward_of(LlamaConfig(**{**SMALL, "vocab_size": vocabulary}))
    forward.model.eval()
    train = prepared(renderer, demo()).train
    rows = {s.line: s for e in demo() if (s := renderer.render(e, 1 << 20))}
    order = schedule.order("d", 1, 0, len(train))
    batches = schedule.steps(order, [len(c.parts) for c in train], 4)
    # One that goes on with a conversation which the step before began.
    straddled = [b for b in batches[:-1] if any(first for _, first, _ in b)]
    pieces = min(straddled, key=lambda b: sum(len(train[c].tokens) for c, _, _ in b))
    merged = [train[c].cut(a, b) for c, a, b in pieces]
    lines = [p.line for c, a, b in pieces for p in train[c].parts[a:b]]
    alone = [rows[line] for line in lines]
    assert len(lines) == 4 and len(merged) < 4
    assert sum(s.loss_tokens for s in merged) == sum(s.loss_tokens for s in alone)
    assert sum(len(s.tokens) for s in merged) < sum(len(s.tokens) for s in alone)
    loss, gradients = forward.gradients(merged)
    other, others = forward.gradients(alone)
    assert loss == pytest.approx(other, rel=1e-5)
    assert (gradients - others).norm() < 1e-5 * others.norm()
    # Token by token, not only in sum.
    with torch.no_grad():
        each = sorted(_token_losses(forward, merged))
        assert each == pytest.approx(sorted(_token_losses(forward, alone)), abs=1e-4)


def _token_losses(forward: Any, sequences: list[render.Sequence]) -> list[float]:
    out = []
    for s in sequences:
        logits = forward.model(input_ids=torch.tensor([list(s.tokens)])).logits[0]
        wanted = torch.tensor(list(s.tokens[1:]))
        losses = torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="none")
        out += [x for x, on in zip(losses.tolist(), s.trained[1:], strict=True) if on]
    return out


def test_a_sequence_learns_what_its_rows_learn(renderer: render.Renderer) -> None:
    ready = prepared(renderer, demo())
    assert not ready.apart and len(ready.train) < prepare.count(ready.train)
    answers = {e.line: e.messages[-1].content for e in demo()}
    for c in ready.train:
        for n, part in enumerate(c.parts):
            text = renderer.decode(c.cut(n, n + 1))
            assert text.count("«") == 1 and f"«{answers[part.line]}" in text
        assert renderer.decode(c.whole()).count("«") == len(c.parts)
    off = prepared(renderer, demo(), merge=False)
    assert prepare.count(off.train) == len(off.train) == prepare.count(ready.train)
    assert sum(len(c.tokens) for c in off.train) == ready.tokens_apart
    assert [renderer.decode(c.whole()) for c in ready.train[:3]] == ready.samples


def test_every_step_has_exactly_its_examples() -> None:
    rng = random.Random(3)
    for _ in range(200):
        sizes = [rng.choice((1, 1, 2, 3, 4, 9)) for _ in range(rng.randrange(1, 60))]
        size, total = rng.choice((1, 2, 4, 7, 32)), sum(sizes)
        order = schedule.order("digest", 1, rng.randrange(3), len(sizes))
        steps = schedule.steps(order, sizes, size)
        assert steps == schedule.steps(order, sizes, size)
        assert len(steps) == schedule.steps_per_epoch(total, size)
        counts = [sum(last - first for _, first, last in step) for step in steps]
        assert set(counts[:-1]) <= {size} and sum(counts) == total
        seen = Counter((c, n) for s in steps for c, first, last in s for n in range(first, last))
        assert set(seen.values()) == {1} and len(seen) == total
        # One conversation stands in a step once.
        assert all(len({c for c, _, _ in step}) == len(step) for step in steps)


def row(line: int, *texts: str, trained: tuple[int, ...] = (-1,)) -> data.Example:
    """A conversation of question and answer in turn; `trained` are places of answers."""
    places = {n % len(texts) for n in trained}
    roles = ("user", "assistant")
    talk = [data.Message(roles[n % 2], t, n in places) for n, t in enumerate(texts)]
    return data.Example(line, "g", tuple(talk))


def merged(
    renderer: render.Renderer, *rows: data.Example, longest: int = 1 << 20
) -> list[list[int]]:
    pairs = [(e, s) for e in rows if (s := renderer.render(e, longest))]
    return [[p.line for p in c.parts] for c in conversation.merge(pairs)[0]]


def test_what_goes_together(renderer: render.Renderer) -> None:
    one, two = row(1, "a", "b"), row(2, "a", "b", "c", "d")
    three = row(3, "a", "b", "c", "d", "e", "f")
    assert merged(renderer, one, two, three) == [[1, 2, 3]]
    assert merged(renderer, replace(three, line=7), two, one) == [[1, 2, 7]]  # in any order
    assert merged(renderer, one, three) == [[1, 3]]
    # Another answer, another group, the same row twice, a span that would count twice.
    assert merged(renderer, one, row(2, "a", "x", "c", "d")) == [[1], [2]]
    assert merged(renderer, one, replace(two, group="h")) == [[1], [2]]
    assert merged(renderer, one, replace(one, line=2), replace(two, line=3)) == [[1], [2, 3]]
    assert merged(renderer, one, row(2, "a", "b", "c", "d", trained=(1, 3))) == [[1], [2]]
    # A branch: the first takes the stem.
    assert merged(renderer, one, two, row(3, "a", "b", "c", "other")) == [[1, 2], [3]]


def test_a_template_that_looks_ahead_keeps_rows_apart(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    # As Qwen3's does: only the last answer gets its empty thoughts.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% generation %}", "{% generation %}{% if loop.last %}{{ 'hm ' }}{% endif %}"
    )
    pairs = [
        (e, s)
        for e in (row(1, "a", "b"), row(2, "a", "b", "c", "d"))
        if (s := render.Renderer(tokenizer).render(e, 512))
    ]
    conversations, odd = conversation.merge(pairs)
    assert [len(c.parts) for c in conversations] == [1, 1] and odd == [2]


def test_what_lost_its_beginning_falls_apart(renderer: render.Renderer) -> None:
    rows = [row(n, *[f"question {i} and its words" for i in range(2 * n)]) for n in (1, 2, 3, 4)]
    lengths = [len(s.tokens) for r in rows if (s := renderer.render(r, 1 << 20))]
    # The third and the fourth are too long: they begin elsewhere.
    assert merged(renderer, *rows, longest=lengths[1]) == [[1, 2], [3], [4]]


def test_too_long_is_never_silent(renderer: render.Renderer) -> None:
    examples = demo()
    lengths = sorted(len(s.tokens) for e in examples if (s := renderer.render(e, 1 << 20)))
    longest = lengths[len(lengths) * 3 // 4]
    long = {
        e.line
        for e in examples
        if len(getattr(renderer.render(e, 1 << 20), "tokens", ())) > longest
    }
    cut = prepared(renderer, examples, longest=longest)
    assert set(cut.shortened) == long and not cut.dropped
    assert [n.code for n in cut.notices if n.level == "warn"] == ["shortened"]
    assert f"{len(long)} of {len(examples)} examples are longer" in cut.notices[0].message
    assert max(len(c.tokens) for c in cut.train + cut.held) <= longest
    gone = prepared(renderer, examples, longest=longest, too_long="drop")
    assert set(gone.dropped) == long and not gone.shortened
    assert prepare.count(gone.train) + prepare.count(gone.held) == len(examples) - len(long)
    with pytest.raises(Failure, match=f"{len(long)} of {len(examples)} examples are longer"):
        prepared(renderer, examples, longest=longest, too_long="error")
    with pytest.raises(Failure, match="examples are longer than 20 tokens"):
        prepared(renderer, examples, longest=20)
    with pytest.raises(Failure, match="no example for training is left"):
        prepared(renderer, examples, longest=20, too_long="drop")
    assert prepared(renderer, examples, too_long="error").notices[0].level != "warn"


def test_documents_lose_their_end(renderer: render.Renderer) -> None:
    texts = ["Once upon a time there was a bike.", "a", ""]
    documents = [
        data.Example(n, f"{n}", (data.Message("text", t, trained=True),))
        for n, t in enumerate(texts, 1)
    ]
    renderer.tokenizer.eos_token, eos = None, renderer.tokenizer.eos_token
    try:
        ready = prepared(renderer, documents, longest=4)
    finally:
        renderer.tokenizer.eos_token = eos
    assert ready.shortened == [1] and ready.dropped == [3]
    said = [n.message for n in ready.notices if n.level == "warn"]
    assert "1 of 3 examples are longer than 4 tokens and lose their end (lines 1)" in said[0]
    assert "1 of 3 examples have no token to learn and are left out (lines 3)" in said[1]


def test_the_policy_is_one_of_three() -> None:
    raw = make_plan(Path("/run"), DEMO, Path("/model"))
    raw["data"]["too_long"] = "shrug"
    with pytest.raises(
        Failure, match=r"data.too_long must be one of truncate_history, drop, error"
    ):
        plan.parse(json.loads(json.dumps(raw)))
