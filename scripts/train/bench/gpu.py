"""One call on one GPU: our loop beside transformers.Trainer on random Llamas of 1B and 8B.

    python -m bench.gpu [--seconds 560] [--json FILE]      on a GPU
    python -m bench.gpu --toy                              all of it on a CPU, small

Weights are made on the device, documents come from a fixed PCG64 stream, and
ceilings (matrix product, copy) are taken in the same call. Every section has a
share of the time; what is done is written after each one, so a call that is cut
off still leaves figures. A and B are transformers.Trainer with the settings of
plain and of tuned TRL, not TRL itself: its loss is made in pieces, theirs here
is not, so where memory ends A and B go on with smaller batches, and say so.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import cpu, ground
from lora_train import fast, memory, optimizer, packing, probe, render
from lora_train.failure import is_out_of_memory

SEED, RANK, RATE = 11, 16, 2e-4
WARM = 3
VENDOR_PEAK = 989e12  # bf16 of an H100, dense
SAYS = {
    "A": "Trainer, plain: float32 weights, padding, recomputation",
    "B": "Trainer, tuned: bf16 weights, flattened rows, no recomputation",
    "C": "lora_train",
}
GOALS = {
    "1b C, tokens/s": 90_000,
    "8b C, tokens/s": 17_500,
    "8b C full, tokens/s": 16_000,
    "C to A": 5.0,
    "C to B": 1.25,
    "memory C to B, at most": 0.6,
    "stall of a checkpoint, at most, s": 0.05,
}


class TimeIsUp(Exception):
    """The whole call has used its time."""


@dataclass(frozen=True)
class Shape:
    """A Llama without weights."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    def linear(self) -> int:
        """Weights of the linear layers without the head."""
        kv = self.width * self.kv_heads // self.heads
        return self.layers * (2 * self.width**2 + 2 * self.width * kv + 3 * self.width * self.inner)

    def flops(self, lengths: Sequence[int], loss_tokens: int, adapter: int) -> float:
        """Work of a training step; recomputation and padding are not counted."""
        tokens = sum(lengths)
        attention = 3.5 * 2 * self.layers * self.width * sum(n * n for n in lengths)
        return (
            tokens * (4 * self.linear() + 6 * adapter)
            + attention
            + 4 * self.vocab * self.width * loss_tokens
        )


SHAPES = {
    "1b": Shape("1b", 16, 2048, 8192, 32, 8, 128_256, True),
    "8b": Shape("8b", 32, 4096, 14336, 32, 8, 128_256, False),
}
TOYS = {
    "1b": Shape("toy 1b", 2, 64, 128, 4, 2, 512, True),
    "8b": Shape("toy 8b", 3, 96, 192, 4, 2, 512, False),
}


@dataclass
class Setting:
    """Where it runs, and how long it may still take."""

    device: str
    toy: bool
    ends: float
    figures: dict[str, Any]
    out: Path | None

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def keep(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Note a figure, in the file as well."""
        self.figures[name] = value
        if self.out:
            self.out.write_text(json.dumps(self.figures, indent=2) + "\n")

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Give memory back and begin to count anew."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """The most bytes since `clear`; 0 on a CPU, which does not count them."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0


def ceilings(s: Setting) -> dict[str, float]:
    """The fastest matrix product and copy, of five each."""
    n, dtype = (256, torch.float32) if s.toy else (8192, torch.bfloat16)
    a, b = (torch.randn(n, n, device=s.device, dtype=dtype) for _ in range(2))
    big = torch.empty((1 << 22) if s.toy else (1 << 32), dtype=torch.uint8, device=s.device)
    other = torch.empty_like(big)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(8):
            s.wait()
            began = time.perf_counter()
            work()
            s.wait()
            times.append(time.perf_counter() - began)
        return min(times[3:])

    return {
        "gemm_flops": 2 * n**3 / best(lambda: a @ b),
        "copy_bytes_per_second": 2 * big.numel() / best(lambda: other.copy_(big)),
    }


def stream(
    shape: Shape, steps: int, batch: int, full: int, toy: bool
) -> list[list[render.Sequence]]:
    """Documents of every step; lengths of chats, or all `full` tokens long."""
    import numpy

    numbers = numpy.random.Generator(numpy.random.PCG64(SEED))
    middle, most = (35, 256) if toy else (350, 4096)
    out = []
    for _ in range(steps):
        drawn = numpy.clip(numbers.lognormal(math.log(middle), 0.95, batch), 16, most)
        rows = []
        for length in [full] * batch if full else [int(n) for n in drawn]:
            tokens = tuple(int(t) for t in numbers.integers(3, shape.vocab, length))
            learned = int(length * 0.6)
            rows.append(render.Sequence(0, tokens, tuple(i >= learned for i in range(length))))
        out.append(rows)
    return out


def build(s: Setting, shape: Shape, whole: bool) -> Any:  # noqa: ANN401
    """The same weights and the same adapter each time; `whole` for float32 weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
    )
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if s.toy else torch.bfloat16)
    try:
        with torch.device(s.device):
            base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    base.config.use_cache = False
    net = get_peft_model(
        base,
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for p in net.parameters():
        if p.requires_grad or whole:
            p.data = p.data.float()
    return net.to(s.device)


def imports() -> None:
    """Have the libraries read before anything has a share of the time."""
    from peft import LoraConfig  # noqa: F401
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments  # noqa: F401


def adapter_size(net: Any) -> int:  # noqa: ANN401
    """How many numbers are trained."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


@dataclass
class Ours:
    """The pieces of our loop, put together as loop.py does."""

    s: Setting
    net: Any
    budget: int

    def __post_init__(self) -> None:
        self.parameters = {n: p for n, p in sorted(self.net.named_parameters()) if p.requires_grad}
        self.optimizer = optimizer.Optimizer(self.parameters, 0.0)
        self.optimizer.begin()
        self.forward = packing.Forward(self.net, self.s.device)

    def ready(self, rows: Sequence[render.Sequence]) -> str:
        """Prove and switch on what is fast; says what is not."""
        odd: list[str] = []
        if why := self.forward.use_packing(rows):
            odd.append(why)
        fast.use(self.forward, rows, (), odd.append)
        return "; ".join(odd)

    def groups(self, rows: Sequence[render.Sequence]) -> list[list[render.Sequence]]:
        """A step in micro-batches."""
        places = self.forward.groups([len(r.tokens) for r in rows], self.budget)
        return [[rows[i] for i in group] for group in places]

    def work(self, rows: Sequence[render.Sequence], count: int) -> torch.Tensor:
        """Gradients of a step in micro-batches; its loss, on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.s.device)
        for group in self.groups(rows):
            part = self.forward.nll(group) / count
            part.backward()
            total += part.detach()
        return total

    def step(self, rows: Sequence[render.Sequence], after: Sequence[render.Sequence]) -> float:
        """One optimizer step, with the rows of the one `after` it made meanwhile; its loss."""
        self.net.train()
        self.optimizer.zero_grad()
        total = self.work(rows, sum(r.loss_tokens for r in rows))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        both = torch.stack([total, norm.double()])
        self.optimizer.step(RATE, 1 - both.isfinite().all().float())
        if after:
            self.forward.prepare(self.groups(after))
        loss, _ = both.tolist()
        self.optimizer.settle(True)
        return loss


def run_ours(
    s: Setting, shape: Shape, steps: list[list[render.Sequence]], ends: float, budget: int
) -> dict[str, Any]:
    """C, a micro-batch of at most `budget` tokens."""
    net = build(s, shape, whole=False)
    it = Ours(s, net, budget)
    why = it.ready(steps[0])
    losses, times = [], []
    for rows, after in zip(steps, [*steps[1:], []], strict=True):
        s.wait()
        began = time.perf_counter()
        losses.append(it.step(rows, after))
        s.wait()
        times.append(time.perf_counter() - began)
        if time.monotonic() > ends:
            break
    return {"losses": losses, "times": times, "note": why, "adapter": adapter_size(net)}


def run_trainer(
    s: Setting,
    shape: Shape,
    steps: list[list[render.Sequence]],
    ends: float,
    plain: bool,
    each: int,
) -> dict[str, Any]:
    """A or B, `each` documents a micro-batch."""
    from transformers import (
        DataCollatorWithFlattening,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    net = build(s, shape, whole=plain)
    features = [
        {
            "input_ids": list(r.tokens),
            "labels": [t if on else -100 for t, on in zip(r.tokens, r.trained, strict=True)],
        }
        for rows in steps
        for r in rows
    ]

    def pad(those: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(f["input_ids"]) for f in those)
        gaps = [width - len(f["input_ids"]) for f in those]
        lists = {
            "input_ids": [f["input_ids"] + [0] * g for f, g in zip(those, gaps, strict=True)],
            "labels": [f["labels"] + [-100] * g for f, g in zip(those, gaps, strict=True)],
            "attention_mask": [[1] * (width - g) + [0] * g for g in gaps],
        }
        return {k: torch.tensor(v) for k, v in lists.items()}

    losses: list[float] = []
    times: list[float] = []

    class Watched(Trainer):
        def training_step(self, *args: Any, **more: Any) -> torch.Tensor:  # noqa: ANN401
            loss = super().training_step(*args, **more)
            parts.append(loss.detach())
            return loss

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
            s.wait()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
            s.wait()
            times.append(time.perf_counter() - self.began)
            losses.append(sum(p.item() for p in parts))
            parts.clear()
            control.should_training_stop = time.monotonic() > ends

    parts: list[torch.Tensor] = []
    batch = len(steps[0])
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=each,
            gradient_accumulation_steps=batch // each,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            train_sampling_strategy="sequential",
            bf16=s.device == "cuda",
            use_cpu=s.device == "cpu",
            activation_checkpointing=plain,
            activation_checkpointing_kwargs={"use_reentrant": False},
            report_to=[],
            save_strategy="no",
            logging_steps=10_000,
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=SEED,
        )
        Watched(
            model=net,
            args=args,
            train_dataset=features,  # pyright: ignore[reportArgumentType]
            data_collator=pad if plain else DataCollatorWithFlattening(return_tensors="pt"),
            callbacks=[Clock()],
        ).train()
    return {"losses": losses, "times": times, "note": "", "adapter": adapter_size(net)}


def fitting(s: Setting, run: Callable[[int], dict[str, Any]], size: int) -> dict[str, Any]:
    """The run with the largest size that fits, halved from `size`."""
    first = size
    while True:
        s.clear()
        try:
            out = run(size)
            out["peak_bytes"], out["size"] = s.peak(), size
            if size != first:
                out["note"] = f"out of memory at {first}, runs at {size}"
            return out
        except Exception as e:
            if not is_out_of_memory(e) or size == 1:
                raise
        size //= 2


def figures_of(s: Setting, shape: Shape, run: dict[str, Any], steps: Any) -> dict[str, Any]:  # noqa: ANN401
    """Speed of the steps after the warm-up."""
    times = run["times"]
    warm = min(WARM, len(times) - 1)
    rows = steps[warm : len(times)]
    spent = sum(times[warm:])
    tokens = sum(len(r.tokens) for step in rows for r in step)
    flops = sum(
        shape.flops([len(r.tokens) for r in step], sum(r.loss_tokens for r in step), run["adapter"])
        for step in rows
    )
    ceiling = s.figures.get("ceilings", {}).get("gemm_flops", math.nan)
    return {
        "tokens_per_second": tokens / spent,
        "steps": len(times),
        "share_of_ceiling": flops / spent / ceiling,
        "share_of_vendor_peak": flops / spent / VENDOR_PEAK,
        "peak_bytes": run["peak_bytes"],
        "size": run["size"],
        "losses": run["losses"],
        "note": run["note"],
    }


def one_model(s: Setting, which: str, seconds: float, counts: dict[str, int]) -> None:
    """All variants on one model, in random order, each with its share of the time."""
    shape = (TOYS if s.toy else SHAPES)[which]
    batch, budget = (8, 512) if s.toy else (32, 16384)
    ends = time.monotonic() + min(seconds, s.left() - 5)
    mix = stream(shape, max(counts.values()), batch, 0, s.toy)
    names = [n for n in counts if n != "C full"]
    random.Random(SEED).shuffle(names)
    if "C full" in counts:
        names.append("C full")
    for place, name in enumerate(names):
        until = time.monotonic() + max(1.0, (ends - time.monotonic()) / (len(names) - place))
        steps = mix[: counts[name]]
        if name == "C full":
            long = 128 if s.toy else 4096
            steps = stream(shape, counts[name], 4, long, s.toy)
        runs: dict[str, Callable[[int], dict[str, Any]]] = {
            "A": lambda n, u=until, st=steps: run_trainer(s, shape, st, u, True, n),
            "B": lambda n, u=until, st=steps: run_trainer(s, shape, st, u, False, n),
        }
        run = runs.get(name, lambda n, u=until, st=steps: run_ours(s, shape, st, u, n))
        try:
            done = fitting(s, run, budget if name[0] == "C" else 8)
            s.keep(f"{which} {name}", figures_of(s, shape, done, steps))
        except TimeIsUp:
            raise
        except Exception as e:
            s.keep(f"{which} {name}", {"failed": f"{type(e).__name__}: {e}"[:300]})
        s.clear()


def memory_section(s: Setting) -> None:
    """How well a probe foretells, and a step that runs out of memory."""
    shape = (TOYS if s.toy else SHAPES)["1b"]
    rows = stream(shape, 1, 32, 0, s.toy)[0]
    it = Ours(s, build(s, shape, whole=False), 512 if s.toy else 32768)
    it.ready(rows)
    lengths = [len(r.tokens) for r in rows]
    count = sum(r.loss_tokens for r in rows)

    def a_pass(tokens: int) -> None:
        it.forward.nll(probe.documents(rows, tokens, max(lengths))).backward()
        it.optimizer.zero_grad()

    meter = probe.meter_of(s.device)
    if meter is None:
        s.keep("probe", {"note": "a CPU's memory is not measured"})
    else:
        planned = probe.Probe(
            meter, a_pass, lambda: memory.release(s.device), lambda: False, lambda: None, 0
        ).plan(max(lengths), sum(lengths), False)
        tokens = min(planned.budget, 3 * probe.HIGH)
        found = meter.peak(tokens, False, lambda: a_pass(tokens))
        foretold = planned.need.of(tokens)
        s.keep("probe", {"tokens": tokens, "foretold": foretold, "found": found}
               | {"budget": planned.budget, "off_by": foretold / found - 1})  # fmt: skip
    whole = it.work(rows, count).item()
    it.optimizer.zero_grad()
    least = it.budget // 4 if s.toy else 0
    ballast, inner = None, it.forward.nll
    if s.device == "cuda":  # leave room for an eighth of the step
        room = int(s.peak() / 8)
        ballast = torch.empty(
            max(0, torch.cuda.mem_get_info()[0] - room), dtype=torch.uint8, device="cuda"
        )
    elif least:

        def tight(group: list[render.Sequence]) -> torch.Tensor:
            if sum(len(r.tokens) for r in group) > least and len(group) > 1:
                raise torch.OutOfMemoryError("forced")
            return inner(group)

        it.forward.nll = tight  # pyright: ignore[reportAttributeAccessIssue]
    budgets, loss = [it.budget], math.nan
    while True:
        try:
            loss = it.work(rows, count).item()
            break
        except Exception as e:
            if not is_out_of_memory(e):
                raise
        it.optimizer.zero_grad()
        memory.release(s.device)
        smaller = memory.smaller_budget(it.forward.groups, lengths, it.budget)
        if not smaller:
            break
        it.budget = smaller
        budgets.append(smaller)
    del ballast
    s.keep("out_of_memory", {"budgets": budgets, "loss": loss, "loss_before": whole})
    s.clear()


def processes_section(s: Setting) -> None:
    """Real trainer processes: time to the first step, checkpoints, a signal."""
    with tempfile.TemporaryDirectory() as temp:
        where = Path(temp)
        model_dir, data = where / "model", where / "rows.jsonl"
        ground.toy_model(model_dir)
        if not s.toy:  # the toy's tokenizer with the weights of the 1B
            net = build(s, SHAPES["1b"], whole=False).unload()
            net.save_pretrained(model_dir)
            del net
            s.clear()
        cpu.write_rows(data, 128)

        def plan(name: str, **over: Any) -> dict[str, Any]:  # noqa: ANN401
            hyper = {**cpu.hyper_of(2), "learning_rate": RATE}
            fixed = {"validation_fraction": 0, "device": s.device} | over
            if s.toy:
                fixed["threads"] = 1
            return ground.plan_of(where / name, data, model_dir, "bench/random", hyper, **fixed)

        signalled: list[float] = []

        def on(process: Any, event: ground.Event) -> None:  # noqa: ANN401
            if event["ev"] == "sample" and event["step"] == 6:
                process.send_signal(signal.SIGTERM)
                signalled.append(time.monotonic())

        trained = ground.train(plan("first"), on)
        waited = time.monotonic() - signalled[0] if signalled else math.nan
        s.keep("sigterm", {"seconds": waited, "code": trained.code})
        s.keep(
            "start",
            {
                "hello": trained.at("hello"),
                "loaded": trained.at("plan"),
                "first_step": trained.at("sample", step=1),
            },
        )
        s.keep("checkpoint", cpu.checkpoint_stall(plan("saving"), 4))


def show(f: dict[str, Any]) -> str:
    """All there is, as tables."""
    rows, by = [], {}
    for which in ("1b", "8b"):
        for name in ("A", "B", "C", "C full"):
            if r := f.get(f"{which} {name}"):
                if "failed" in r:
                    rows.append([which, name, r["failed"], "", "", "", "", ""])
                    continue
                by[f"{which} {name}"] = r
                at = min(10, len(r["losses"])) - 1
                rows.append(
                    [
                        which,
                        name,
                        f"{r['tokens_per_second']:,.0f}",
                        r["steps"],
                        f"{r['share_of_ceiling']:.1%}",
                        f"{r['peak_bytes'] / 2**30:.1f}",
                        f"{r['losses'][at]:.5f} at {at + 1}",
                        r["note"],
                    ]
                )
    head = ["model", "", "useful tokens/s", "steps", "of the ceiling", "peak GiB", "loss", "note"]
    rest = [
        [k, json.dumps(v)] for k, v in f.items() if k not in by and not k.startswith(("1b ", "8b "))
    ]
    for which in ("1b", "8b"):
        for other in ("A", "B"):
            if (c := by.get(f"{which} C")) and (o := by.get(f"{which} {other}")):
                n = min(len(c["losses"]), len(o["losses"]), 10)
                apart = abs(c["losses"][n - 1] / o["losses"][n - 1] - 1)
                ratio = c["tokens_per_second"] / o["tokens_per_second"]
                memories = c["peak_bytes"] / max(1, o["peak_bytes"])
                said = f"{ratio:.2f} times as fast, memory {memories:.2f}"
                said = f"{said}, loss of step {n} apart {apart:.1e}"
                rest.append([f"{which}: C to {other}", said])
    legend = [[k, v] for k, v in SAYS.items()]
    goals = [[k, f"{v:,}"] for k, v in GOALS.items()]
    tables = [ground.table(head, rows), ground.table(["", ""], legend)]
    return "\n\n".join(
        [*tables, ground.table(["", ""], rest), ground.table(["goal, one H100", ""], goals)]
    )


def main(argv: list[str] | None = None) -> int:
    """Measure as much as there is time for, print what there is."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--toy", action="store_true", help="small, on the CPU")
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--json", type=Path, help="write the figures here, after each section")
    args = parser.parse_args(argv)
    if not args.toy and not torch.cuda.is_available():
        print("no CUDA device: --toy runs all of it on a CPU", file=sys.stderr)
        return 2
    s = Setting(
        "cpu" if args.toy else "cuda", args.toy, time.monotonic() + args.seconds, {}, args.json
    )

    def up(*_: object) -> None:
        raise TimeIsUp

    signal.signal(signal.SIGALRM, up)
    signal.signal(signal.SIGTERM, up)
    signal.setitimer(signal.ITIMER_REAL, args.seconds)
    if args.toy:
        torch.set_num_threads(1)
    name = "CPU" if args.toy else torch.cuda.get_device_name(0)
    s.keep("machine", {**ground.machine(), "device": name, "torch": torch.__version__})
    small = {"A": 4, "B": 4, "C": 4}
    sections: dict[str, Callable[[], object]] = {
        "imports": imports,
        "ceilings": lambda: s.keep("ceilings", ceilings(s)),
        "1b": lambda: one_model(s, "1b", 120, small if s.toy else {"A": 12, "B": 20, "C": 20}),
        "8b": lambda: one_model(
            s,
            "8b",
            300,
            {**small, "C full": 4} if s.toy else {"A": 4, "B": 10, "C": 12, "C full": 8},
        ),
        "memory": lambda: memory_section(s),
        "processes": lambda: processes_section(s),
    }
    try:
        for what, section in sections.items():
            began = time.monotonic()
            try:
                section()
            except TimeIsUp:
                raise
            except Exception as e:
                s.keep(f"{what} failed", f"{type(e).__name__}: {e}"[:300])
            s.keep(f"{what}, seconds", round(time.monotonic() - began, 1))
    except TimeIsUp:
        s.keep("cut off", "the time was up: what is missing was not measured")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    print(show(s.figures))
    return 0 if not any("failed" in k for k in s.figures) else 1


if __name__ == "__main__":
    sys.exit(main())
