"""Our loop beside transformers.Trainer on the CPU, and what goes on around the steps.

    python -m bench.cpu [--rounds 3] [--quick] [--json FILE]

Same base model, same adapter, same examples in each step, same learning rate:
so the losses must be the same. The variants take turns and each one has a
process of its own, with one thread. Only what stands side by side can be compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bench import ground
from lora_train.__main__ import ENVIRONMENT

T = TypeVar("T")
NAME = "bench/toy-llama"
WARM = 3  # steps that are not counted
BATCH = 8
VARIANTS = {
    "padded": "transformers.Trainer, its defaults",
    "grouped": "transformers.Trainer, group_by_length",
    "flattened": "transformers.Trainer, DataCollatorWithFlattening",
    "ours": "lora_train",
}
SAME_ORDER = ("padded", "flattened", "ours")

IMPORTS = """
import json, sys, time
began, out = time.monotonic(), {}
for name in ("torch", "transformers", "peft"):
    __import__(name)
    if name == "transformers":
        from transformers import AutoModelForCausalLM, AutoTokenizer
    now = time.monotonic()
    out[name] = now - began
    began = now
print(json.dumps(out))
"""


def write_rows(path: Path, count: int, seed: int = 5) -> None:
    """Conversations of one exchange, their lengths spread as those of real chats.

    Words come from the demo's data; the numbers from a PCG64 stream.
    """
    import numpy

    random = numpy.random.Generator(numpy.random.PCG64(seed))
    words = sorted({w for w in ground.DEMO.read_text().split() if w.isascii() and w.isalpha()})
    with path.open("w") as out:
        for length in numpy.minimum(random.lognormal(numpy.log(110), 0.95, count), 600):
            asked, answered = max(2, int(length * 0.6)), max(2, int(length * 0.4))
            text = [words[i] for i in random.integers(0, len(words), asked + answered)]
            turns = [("user", text[:asked]), ("assistant", text[asked:])]
            messages = [{"role": r, "content": " ".join(t)} for r, t in turns]
            out.write(json.dumps({"messages": messages}) + "\n")


def hyper_of(epochs: int) -> dict[str, Any]:
    """The settings that all variants share."""
    return {
        "learning_rate": 5e-3,
        "batch_size": BATCH,
        "epochs": epochs,
        "rank": 8,
        "alpha": 16,
        "warmup_steps": 2,
        "max_seq_length": 1024,
    }


# --- The other trainer ----------------------------------


def trainer(raw: dict[str, Any], variant: str) -> dict[str, Any]:
    """Train with transformers.Trainer what a plan says, in this process."""
    import torch
    from transformers import (
        DataCollatorWithFlattening,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from lora_train import data, model, prepare, render, schedule
    from lora_train import plan as plans

    plan = plans.parse(raw)
    h = plan.hyperparameters
    torch.set_num_threads(plan.threads)
    examples = data.read(plan.data.path, plan.data.sha256)
    renderer = render.Renderer(model.tokenizer_of(plan.base_model.path))
    ready = prepare.prepare(plan, examples, renderer, h.max_seq_length)
    rows = [c.whole() for c in ready.train]
    # A smaller last step would shift the steps of the next epoch.
    assert len(rows) % h.batch_size == 0, len(rows)
    order = [
        i
        for epoch in range(h.epochs)
        for i in schedule.order(plan.data.sha256, h.seed, epoch, len(rows))
    ]
    total = len(order) // h.batch_size
    features = [
        {
            "input_ids": list(s.tokens),
            "labels": [t if on else -100 for t, on in zip(s.tokens, s.trained, strict=True)],
        }
        for s in (rows[i] for i in order)
    ]

    def pad(those: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(f["input_ids"]) for f in those)

        def filled(key: str, value: int) -> torch.Tensor:
            return torch.tensor([f[key] + [value] * (width - len(f[key])) for f in those])

        mask = torch.tensor(
            [[1] * len(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in those]
        )
        return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100)} | {
            "attention_mask": mask
        }

    losses: list[float] = []
    tokens: list[int] = []
    ends: list[float] = []

    class Watched(Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> torch.Tensor:  # noqa: ANN401
            mask = inputs.get("attention_mask")
            tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
            loss = super().training_step(model, inputs, *rest, **more)
            losses.append(loss.item())
            return loss

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
            ends.append(time.monotonic())

    net: Any = model.load(plan)
    parameters = list(model.trainable(net).values())
    optimizer = torch.optim.AdamW(parameters, lr=h.learning_rate, weight_decay=h.weight_decay)

    def factor(done: int) -> float:
        return schedule.learning_rate(1.0, done + 1, total, h.warmup_steps)

    grouped = variant == "grouped"
    flat = DataCollatorWithFlattening(return_tensors="pt")
    with tempfile.TemporaryDirectory() as out:
        Watched(
            model=net,
            args=TrainingArguments(
                output_dir=out,
                per_device_train_batch_size=h.batch_size,
                num_train_epochs=1,
                train_sampling_strategy="group_by_length" if grouped else "sequential",
                max_grad_norm=1.0,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                seed=h.seed,
                dataloader_pin_memory=False,
                remove_unused_columns=False,
            ),
            train_dataset=features,  # pyright: ignore[reportArgumentType]
            data_collator=flat if variant == "flattened" else pad,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)),
            callbacks=[Clock()],
        ).train()
    return {"losses": losses, "tokens": tokens, "ends": ends}


def forked(work: Callable[[], T]) -> T:
    """What `work` returns in a fork of this process, which has the libraries already.

    As fresh as a new process for all that is ours, without nine seconds of imports.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            with os.fdopen(write, "w") as out:
                json.dump(work(), out)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as answer:
        said = answer.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a measured process failed")
    return json.loads(said)


def ours(plan: dict[str, Any]) -> ground.Trained:
    """The trainer in a fork; the proof of the adapter is left out, it comes after the steps."""

    def work() -> int:
        from lora_train import plan as plans
        from lora_train import ranks, reload, session, wire
        from lora_train.stop import Stop

        one = plans.parse(plan)
        one.run_dir.mkdir(parents=True)
        reload.prove = lambda *asked, **_: asked[3]
        emit = wire.Emitter(job=one.job, attempt=1, path=one.run_dir / "events.jsonl")
        code = session.perform(session.Session(one, emit, Stop()), ranks.run)
        emit.close()
        return code

    began = time.time()
    code = forked(work)
    lines = (Path(plan["run_dir"]) / "events.jsonl").read_text().splitlines()
    events = [(e["ts"] / 1000 - began, e) for e in map(json.loads, lines)]
    return ground.Trained(code, time.time() - began, events)


def run_variant(plan: dict[str, Any], variant: str) -> dict[str, Any]:
    """Losses, tokens of each step, and when each step ended, in seconds."""
    if variant != "ours":
        return forked(lambda: trainer(plan, variant))
    trained = ours(plan)
    if trained.code:
        raise SystemExit(f"the trainer failed: {trained.of('error')}")
    steps = [(t, e) for t, e in trained.events if e["ev"] == "sample"]
    return {
        "losses": [e["loss"] for _, e in steps],
        "tokens": [e["tokens"] for _, e in steps],
        "ends": [t for t, _ in steps],
    }


def speed(run: dict[str, Any]) -> float:
    """Useful tokens in a second, padding not counted, first steps left out."""
    return sum(run["tokens"][WARM:]) / (run["ends"][-1] - run["ends"][WARM - 1])


# --- Around the steps -------------------------------------------------------------


def event_seconds(where: Path, repeats: int = 2000) -> float:
    """What a step spends on telling about itself: one sample, to a file and a pipe."""
    from lora_train import wire

    read, write = os.pipe()
    reader = subprocess.Popen(["cat"], stdin=read, stdout=subprocess.DEVNULL)
    os.close(read)
    emit = wire.Emitter(job="bench", attempt=1, path=where / "events.jsonl", fd=write)
    began = time.perf_counter()
    for step in range(1, repeats + 1):
        emit.expect(10.0)
        emit.alive()
        emit.send(
            "sample", step=step, epoch=0.5, loss=1.2345678901234567, learning_rate=1e-4,
            grad_norm=0.98765432109876, tokens=4096, loss_tokens=1638, tokens_per_second=12345.678,
            seconds=0.331234, skipped=False,
        )  # fmt: skip
    spent = (time.perf_counter() - began) / repeats
    emit.close()
    os.close(write)
    reader.wait()
    return spent


def tokenizing(where: Path, model_dir: Path, rows: int) -> dict[str, float]:
    """Rows and tokens in a second, from bytes to masked sequences."""
    from lora_train import data, model, prepare, render
    from lora_train import plan as plans

    path = where / "many.jsonl"
    write_rows(path, rows, seed=6)
    plan = plans.parse(ground.plan_of(where / "none", path, model_dir, NAME, hyper_of(1)))
    tokenizer = model.tokenizer_of(model_dir)
    began = time.perf_counter()
    examples = data.read(path, plan.data.sha256)
    read = time.perf_counter()
    ready = prepare.prepare(plan, examples, render.Renderer(tokenizer), 1024)
    done = time.perf_counter()
    tokens = sum(len(c.whole().tokens) for c in (*ready.train, *ready.held))
    return {
        "rows": rows,
        "read_rows_per_second": rows / (read - began),
        "rows_per_second": rows / (done - began),
        "tokens_per_second": tokens / (done - began),
    }


def checkpoint_stall(
    plan: dict[str, Any], every: int, run: Callable[[dict[str, Any]], ground.Trained] = ground.train
) -> dict[str, float]:
    """How much longer a step takes to follow when a checkpoint lies between.

    The checkpoint's own event ends it when it is written while nobody steps;
    what counts is the gap between two steps, as the training feels it.
    """
    trained = run({**plan, "checkpoint_every_steps": every})
    if trained.code:
        raise SystemExit("the run for checkpoints failed")
    steps = [(t, e) for t, e in trained.events if e["ev"] == "sample"][WARM:]
    with_one, without = [], []
    for (a, e), (b, f) in itertools.pairwise(steps):
        gap = b - a - f["seconds"]
        (with_one if e["step"] % every == 0 else without).append(gap)
    stall = ground.median(with_one) - ground.median(without)
    size = ground.median([e["bytes"] for e in trained.of("checkpoint")])
    return {"seconds": stall, "bytes": size, "checkpoints": len(with_one)}


def start_up(trained: ground.Trained) -> dict[str, float]:
    """Seconds from the start of the process to the first step, and where they went."""
    bare = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    interpreter = time.perf_counter() - bare
    said = subprocess.run(
        [sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE, check=True
    ).stdout
    first = trained.at("sample", step=1)
    points = {
        "to hello": trained.at("hello"),
        "to data read and tokenised": trained.at("stage", stage="loading_model"),
        "to loaded and proved": trained.at("plan"),
        "to first step": first,
    }
    alone = {f"import {k}, alone": v for k, v in json.loads(said.splitlines()[-1]).items()}
    return {"interpreter, alone": interpreter, **alone, **points}


def measure(rounds: int, epochs: int, rows: int) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as temp:
        where = Path(temp)
        model, data = where / "model", where / "rows.jsonl"
        ground.toy_model(model)
        write_rows(data, rows)

        def plan(name: str, **over: Any) -> dict[str, Any]:  # noqa: ANN401
            fixed = {"validation_fraction": 0, "threads": 1, "merge": False} | over
            return ground.plan_of(where / name, data, model, NAME, hyper_of(epochs), **fixed)

        runs: dict[str, list[dict[str, Any]]] = {v: [] for v in VARIANTS}
        for n in range(rounds):
            for v in VARIANTS if n % 2 == 0 else reversed(VARIANTS):
                runs[v].append(run_variant(plan(f"{v}-{n}"), v))
                print(f"round {n + 1}, {v}: {speed(runs[v][-1]):,.0f} tokens/s", file=sys.stderr)
        first = runs["ours"][0]
        for v in SAME_ORDER:  # otherwise the losses say nothing
            assert runs[v][0]["tokens"] == first["tokens"], v
        at = min(10, len(first["losses"])) - 1
        apart = {
            v: max(
                abs(a - b) / abs(b)
                for a, b in zip(runs[v][0]["losses"], first["losses"], strict=True)
            )
            for v in SAME_ORDER
        }
        medians = {v: ground.median([speed(r) for r in runs[v]]) for v in VARIANTS}
        step = ground.median(
            [b - a for r in runs["ours"] for a, b in zip(r["ends"][WARM:], r["ends"][WARM + 1 :])]  # noqa: B905
        )
        event = event_seconds(where)
        return {
            "machine": ground.machine(),
            "rounds": rounds,
            "steps": len(first["losses"]),
            "tokens_a_step": ground.median(first["tokens"]),
            "tokens_per_second": medians,
            "spread": {v: [min(map(speed, runs[v])), max(map(speed, runs[v]))] for v in VARIANTS},
            "loss_at_10": {v: runs[v][0]["losses"][at] for v in SAME_ORDER},
            "largest_relative_difference": apart,
            "step_seconds": step,
            "event_seconds": event,
            "event_share": event / step,
            "tokenizing": tokenizing(where, model, 8 * rows),
            "checkpoint": checkpoint_stall(plan("saving"), 4, ours),
            "start": start_up(ground.train(plan("start"))),
        }


def show(f: dict[str, Any]) -> str:
    """The figures as tables."""
    base = f["tokens_per_second"]["padded"]
    speeds = [
        [
            VARIANTS[v],
            f"{t:,.0f}",
            "{:,.0f} to {:,.0f}".format(*f["spread"][v]),
            f"{t / base:.2f}",
            f"{f['loss_at_10'][v]:.9f}" if v in SAME_ORDER else "other order",
            f"{f['largest_relative_difference'][v]:.1e}" if v in SAME_ORDER else "",
        ]
        for v, t in f["tokens_per_second"].items()
    ]
    head = ["", "useful tokens/s", "of the rounds", "to defaults", "loss, step 10", "apart at most"]
    t, c = f["tokenizing"], f["checkpoint"]
    rest = [
        ["a step", f"{f['step_seconds'] * 1e3:.1f} ms"],
        ["its event", f"{f['event_seconds'] * 1e6:.0f} µs, {f['event_share']:.3%} of a step"],
        ["reading rows", f"{t['read_rows_per_second']:,.0f} rows/s"],
        [
            "to masked tokens",
            f"{t['rows_per_second']:,.0f} rows/s, {t['tokens_per_second']:,.0f} tokens/s",
        ],
        ["stall of a checkpoint", f"{c['seconds'] * 1e3:.1f} ms, {c['bytes'] / 1e6:.2f} MB"],
        *([k, f"{v:.2f} s"] for k, v in f["start"].items()),
    ]
    m = f["machine"]
    return "\n\n".join(
        [
            f"{m['date']}, {m['cpus']} CPUs, no GPU, load {m['load']}; {f['rounds']} rounds of "
            f"{f['steps']} steps, {f['tokens_a_step']:,.0f} tokens a step",
            ground.table(head, speeds),
            ground.table(["", ""], rest),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="shows that it works, not how fast")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    os.environ.update(ENVIRONMENT)
    import torch

    torch.set_num_threads(1)  # a fork has no threads but its own
    rounds, epochs, rows = (1, 1, 88) if args.quick else (args.rounds, 2, 192)
    figures = measure(rounds, epochs, rows)
    print(show(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
