"""The real trainer on the CPU, in processes of its own: exact, resumable, loadable."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, Run, at_step, make_plan, play

from lora_train import data, render


def test_a_run_says_all_that_the_protocol_wants(reference: Run) -> None:
    steps = [e["step"] for e in reference.of("sample")]
    plan = reference.of("plan")[0]
    assert steps == list(range(1, plan["total_steps"] + 1))
    assert [e["seq"] for e in reference.events] == list(range(1, len(reference.events) + 1))
    assert len(reference.of("eval")) == 2 and reference.of("checkpoint")[-1]["final"]
    samples = [e["message"] for e in reference.of("log") if e["code"] == "training_sample"]
    assert len(samples) == 3 and all("«" in s and "»" in s for s in samples)
    assert float(reference.of("sample")[-1]["loss"]) < float(reference.of("sample")[0]["loss"])


def test_the_adapter_loads_on_the_base_model(reference: Run, model: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    tokens = torch.arange(20).unsqueeze(0)
    before = base(input_ids=tokens).logits
    tuned = PeftModel.from_pretrained(base, reference.of("result")[0]["path"])
    assert not torch.equal(before, tuned(input_ids=tokens).logits)


def resume(first: Run, plan: dict[str, Any], where: Path) -> Run:
    """A second attempt from the newest checkpoint of the first, moved elsewhere."""
    newest = first.of("checkpoint")[-1]["path"]
    moved = where / "fetched" / Path(newest).name
    shutil.copytree(newest, moved)
    return Run({**plan, "attempt": 2, "run_dir": str(where / "second"), "resume_from": str(moved)})


@pytest.mark.parametrize("step", [3, 11])
def test_sigterm_saves_and_resumes_to_the_same_bits(
    step: int, reference: Run, model: Path, tmp_path: Path
) -> None:
    plan = make_plan(tmp_path / "first", DEMO, model)
    first = Run(plan)
    assert first.finish(at_step(step, signal.SIGTERM)) == 75
    assert first.of("exit")[0]["last_checkpoint_step"] >= step
    second = resume(first, plan, tmp_path)
    assert second.finish() == 0
    assert [step for step, _ in second.history()] == [step for step, _ in reference.history()]
    assert {**first.losses(), **second.losses()} == reference.losses()
    assert second.adapter() == reference.adapter()


def test_sigkill_resumes_to_the_same_bits(reference: Run, model: Path, tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "first", DEMO, model)
    first = Run(plan)
    assert first.finish(at_step(7, signal.SIGKILL)) == -signal.SIGKILL
    second = resume(first, plan, tmp_path)
    assert second.finish() == 0
    assert second.losses() == {k: v for k, v in reference.losses().items() if k in second.losses()}
    assert second.adapter() == reference.adapter()


def test_a_flipped_byte_costs_one_checkpoint(reference: Run, model: Path, tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "first", DEMO, model)
    first = Run(plan)
    assert first.finish(at_step(9, signal.SIGTERM)) == 75
    newest = Path(first.of("checkpoint")[-1]["path"])
    weights = newest / "adapter.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    second = Run(
        {**plan, "attempt": 2, "run_dir": str(tmp_path / "second"), "resume_from": str(newest)}
    )
    assert second.finish() == 0
    assert second.of("plan")[0]["start_step"] < first.of("exit")[0]["last_checkpoint_step"]
    assert any(e["code"] == "checkpoint_damaged" for e in second.of("log"))
    assert second.adapter() == reference.adapter()


def test_the_budget_of_a_micro_batch_changes_no_loss(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hyper = {"dropout": 0.0, "epochs": 1}
    whole = play(make_plan(tmp_path / "whole", DEMO, model, hyper=hyper))
    monkeypatch.setattr("lora_train.loop.BUDGET", 200)
    parts = play(make_plan(tmp_path / "parts", DEMO, model, hyper=hyper))
    monkeypatch.setattr("lora_train.packing.carries", lambda _: "a test wants it so")
    padded = play(make_plan(tmp_path / "padded", DEMO, model, hyper=hyper))
    assert whole.code == parts.code == padded.code == 0
    assert not whole.logs("varlen_fallback") and padded.logs("varlen_fallback")
    assert parts.losses() == pytest.approx(whole.losses(), rel=1e-6)
    assert padded.losses() == pytest.approx(whole.losses(), rel=1e-6)
    validation = [[e["validation_loss"] for e in r.of("eval")] for r in (whole, parts, padded)]
    assert validation[1] == pytest.approx(validation[0], rel=1e-6)
    assert validation[2] == pytest.approx(validation[0], rel=1e-6)


def test_bad_data_ends_with_its_code(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "alone"}]}\n')
    run = Run(make_plan(tmp_path / "run", bad, model))
    assert run.finish() == 65
    assert "line 1 has no assistant text" in run.of("error")[0]["message"]


def test_nothing_but_the_answer_is_trained_on(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    say = data.Message
    talk = (
        say("system", "Be kind."),
        say("user", "Old question?"),
        say("assistant", "Old answer."),
        say("user", "New question?"),
        say("assistant", "New answer.", trained=True),
    )
    marked = render.Renderer(tokenizer)
    text = marked.decode(marked.render(data.Example(1, "g", talk), 512) or pytest.fail("too long"))
    assert text.count("«") == 1 and "«New answer." in text
    # A base model without a template gets a plain one and no new tokens.
    tokenizer.chat_template = None
    plain = render.Renderer(tokenizer)
    sequence = plain.render(data.Example(1, "g", talk), 512)
    assert sequence is not None and "«New answer." in plain.decode(sequence)
    assert max(sequence.tokens) < len(tokenizer)
    # What is too long loses its oldest exchange, never its answer.
    short = plain.render(data.Example(1, "g", talk), len(sequence.tokens) - 1)
    assert short is not None
    assert "Old question" not in plain.decode(short) and "«New answer." in plain.decode(short)
    assert plain.render(data.Example(1, "g", talk), 3) is None


def test_a_document_gets_no_template(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    document = data.Example(1, "g", (data.Message("text", "Once upon a time.", trained=True),))
    whole = render.Renderer(tokenizer).render(document, 512)
    assert whole is not None and all(whole.trained)
    assert "Once upon a time." in tokenizer.decode(whole.tokens)
    assert whole.tokens[-1] == tokenizer.eos_token_id
    short = render.Renderer(tokenizer).render(document, 3)
    assert short is not None and short.tokens == whole.tokens[:3]


def test_tool_calls_are_trained_on_as_answers(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokenizer.chat_template = None
    talk = [
        {"role": "user", "content": "How warm?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "warmth", "arguments": '{"at": "home"}'}}],
        },
        {"role": "tool", "content": "20"},
        {"role": "assistant", "content": "Twenty degrees."},
    ]
    row = {"messages": talk, "tools": [{"function": {"name": "warmth"}}]}
    (example,), _ = data.judge(json.dumps(row).encode())
    plain = render.Renderer(tokenizer)
    text = plain.decode(plain.render(example, 512) or pytest.fail("too long"))
    assert "### Tools:" in text and "### Tool:\n20" in text
    assert '«{"name": "warmth", "arguments": {"at": "home"}}' in text and "«Twenty degrees." in text


def test_no_pickle_in_a_checkpoint(reference: Run) -> None:
    files = reference.of("checkpoint")[-1]["files"]
    names = sorted(f["name"] for f in files)
    # The best adapter stands beside the newest when they differ.
    assert set(names) - {"best.safetensors"} == {
        "adapter.safetensors",
        "manifest.json",
        "metrics.jsonl",
        "optimizer.safetensors",
        "state.json",
    }
    path = Path(reference.of("checkpoint")[-1]["path"])
    assert json.loads((path / "state.json").read_text())["step"] == path_step(path)


def path_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
