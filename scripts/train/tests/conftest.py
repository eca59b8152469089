"""What several tests need: a plan, the small base model, a run in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import pytest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "testdata" / "demo.jsonl"


def make_plan(run_dir: Path, data: Path, model: Path, **over: Any) -> dict[str, Any]:
    """A plan as the agent writes it; `hyper` and `dry` entries are laid over the defaults."""
    hyper = {
        "learning_rate": 0.01,
        "batch_size": 4,
        "epochs": 2,
        "rank": 4,
        "alpha": 8,
        "dropout": 0.1,
        "max_seq_length": 512,
        "seed": 42,
        **over.pop("hyper", {}),
    }
    return {
        "v": 1,
        "job": "6e2f6d0e-0000-4000-8000-000000000001",
        "attempt": 1,
        "backend": "torch",
        "run_dir": str(run_dir),
        "device": "cpu",
        "base_model": {"name": "lorayard/demo-llama", "path": str(model)},
        "data": {"path": str(data), "sha256": hashlib.sha256(data.read_bytes()).hexdigest()},
        "hyperparameters": hyper,
        "validation_fraction": 0.2,
        "checkpoint_every_steps": 2,
        "checkpoint_every_seconds": 0,
        "threads": 1,
        **over,
    }


class Run:
    """One trainer process and what it said; forked unless a real start is wanted."""

    def __init__(self, plan: dict[str, Any], real: bool = False) -> None:
        self.dir = Path(plan["run_dir"])
        self.dir.mkdir(parents=True, exist_ok=True)
        path = self.dir / "plan.json"
        path.write_text(json.dumps(plan))
        self.read, write = os.pipe()
        self.process: subprocess.Popen[bytes] | forks.Child
        if real:
            self.process = _start(path, write, self.dir / "stderr.txt")
        else:
            self.process = forks.trainer(path, write, self.dir / "stderr.txt")
        os.close(write)

    def finish(self, on: Callable[[Run, dict[str, Any]], None] | None = None) -> int:
        """Read events to their end, letting `on` act on each; returns the exit code."""
        self.events: list[dict[str, Any]] = []
        with os.fdopen(self.read) as lines:
            for line in lines:
                event = json.loads(line)
                self.events.append(event)
                if on is not None:
                    on(self, event)
        return self.process.wait()

    def of(self, ev: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [e for e in self.events if e["ev"] == ev]

    def losses(self) -> dict[int, str]:
        """Loss by step, to the last bit."""
        return {e["step"]: float(e["loss"]).hex() for e in self.of("sample")}

    def output(self, name: str) -> bytes:
        """One file of the adapter."""
        return (Path(self.of("result")[0]["path"]) / name).read_bytes()

    def history(self) -> list[tuple[int, float]]:
        """(step, loss) as metrics.jsonl has it."""
        rows = [json.loads(line) for line in self.output("metrics.jsonl").splitlines()]
        return [(r["step"], r["loss"]) for r in rows if r["ev"] == "sample"]

    def adapter(self) -> str:
        """The digest of the final weights."""
        files = self.of("result")[0]["files"]
        return next(f["sha256"] for f in files if f["name"] == "adapter_model.safetensors")


def _start(plan: Path, write: int, errors: Path) -> subprocess.Popen[bytes]:
    with open(errors, "w") as stderr:
        return subprocess.Popen(
            [
                "bash",
                "-c",
                f"exec {sys.executable} -m lora_train --plan {plan} 3>&{write} {write}>&-",
            ],
            cwd=ROOT,
            pass_fds=[write],
            stderr=stderr,
        )


@dataclass
class Played:
    """A run within this process: its exit code and its events."""

    code: int
    events: list[dict[str, Any]]

    def of(self, ev: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [e for e in self.events if e["ev"] == ev]

    def logs(self, code: str) -> list[str]:
        """What was logged under a code."""
        return [e["message"] for e in self.of("log") if e["code"] == code]

    def losses(self) -> list[float]:
        """The loss of every sample, in the order in which they came."""
        return [float(e["loss"]) for e in self.of("sample")]


def play(plan: dict[str, Any]) -> Played:
    """Train in this process, where a test can put something wrong in the way."""
    from lora_train import plan as plans
    from lora_train import ranks, session, wire
    from lora_train.stop import Stop

    one = plans.parse(plan)
    one.run_dir.mkdir(parents=True)
    path = one.run_dir / "events.jsonl"
    emit = wire.Emitter(job=one.job, attempt=one.attempt, path=path)
    with forks.reading():
        code = session.perform(session.Session(one, emit, Stop()), ranks.run)
    emit.close()
    return Played(code, [json.loads(line) for line in path.read_text().splitlines()])


def at_step(step: int, number: signal.Signals) -> Callable[[Run, dict[str, Any]], None]:
    """Signal the trainer when it has done a step."""

    def act(run: Run, event: dict[str, Any]) -> None:
        if event["ev"] == "sample" and event["step"] == step:
            run.process.send_signal(number)

    return act


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few thousand parameters with a tokenizer of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_train import demo_model

    # The demo's tokenizer on a much smaller model: the tests are about exactness.
    tiny = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = demo_model.make_tokenizer(demo_model.texts_of(DEMO))
    tokenizer.save_pretrained(tiny, save_jinja_files=False)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tiny)
    return tiny


@pytest.fixture(scope="session")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody disturbed."""
    run = Run(make_plan(tmp_path_factory.mktemp("reference") / "run", DEMO, model), real=True)
    assert run.finish() == 0, (run.dir / "stderr.txt").read_text()
    return run
