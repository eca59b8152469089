"""What the measurements share: a plan, a trainer process, what it said, and a table."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "testdata" / "demo.jsonl"
Event = dict[str, Any]


def plan_of(
    run_dir: Path,
    data: Path,
    model: Path,
    name: str,
    hyper: dict[str, Any],
    merge: bool = True,
    **over: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """A plan as the agent writes it."""
    return {
        "v": 1,
        "job": "00000000-0000-4000-8000-000000000005",
        "attempt": 1,
        "backend": "torch",
        "run_dir": str(run_dir),
        "device": "cpu",
        "base_model": {"name": name, "path": str(model)},
        "data": {
            "path": str(data),
            "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
            "merge": merge,
        },
        "hyperparameters": hyper,
        "checkpoint_every_seconds": 0,
        **over,
    }


@dataclass
class Trained:
    """A trainer process from its start to its end; times are seconds since the start."""

    code: int
    seconds: float
    events: list[tuple[float, Event]] = field(default_factory=list)

    def of(self, ev: str) -> list[Event]:
        """The events of one kind."""
        return [e for _, e in self.events if e["ev"] == ev]

    def at(self, ev: str, **fields: object) -> float:
        """When the first event of a kind, with these fields, came."""
        for t, e in self.events:
            if e["ev"] == ev and all(e.get(k) == v for k, v in fields.items()):
                return t
        raise LookupError(f"no event {ev} {fields}")


def train(
    plan: dict[str, Any],
    on: Callable[[subprocess.Popen[bytes], Event], None] = lambda _p, _e: None,
    environment: dict[str, str] | None = None,
) -> Trained:
    """Run the trainer as the agent does; `on` sees every event as it comes."""
    run_dir = Path(plan["run_dir"])
    run_dir.mkdir(parents=True)
    path = run_dir / "plan.json"
    path.write_text(json.dumps(plan))
    read, write = os.pipe()
    began = time.monotonic()
    with open(run_dir / "stderr.txt", "wb") as stderr:
        process = subprocess.Popen(
            [
                *("bash", "-c", 'exec "$0" -m lora_train --plan "$1" 3>&"$2"'),
                *(sys.executable, str(path), str(write)),
            ],
            cwd=ROOT,
            pass_fds=[write],
            stderr=stderr,
            env={**os.environ, **(environment or {})},
        )
    os.close(write)
    out = Trained(0, 0.0)
    try:
        with os.fdopen(read) as lines:
            for line in lines:
                event = json.loads(line)
                out.events.append((time.monotonic() - began, event))
                on(process, event)
        out.code = process.wait()
    finally:
        process.kill()
        process.wait()
    out.seconds = time.monotonic() - began
    return out


def toy_model(out: Path) -> None:
    """A small Llama with random weights, and a tokenizer that knows the demo's words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_train import demo_model

    tokenizer = demo_model.make_tokenizer(demo_model.texts_of(DEMO))
    torch.manual_seed(1)
    ends: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")
    }
    config = LlamaConfig(
        **ends,
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


def machine() -> dict[str, Any]:
    """What the figures belong to; no name of a host."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def median(values: Sequence[float]) -> float:
    """The median; not a number when there is nothing."""
    return statistics.median(values) if values else float("nan")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, aligned for reading as it is."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    wide = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, wide, strict=True)) + " |" for r in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in wide) + "|", *lines[1:]])
