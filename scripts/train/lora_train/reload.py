"""Proof that the adapter on disk is the one that was trained.

A fresh process reads it as anybody would: the base model, peft, the plain
forward pass. Its loss on one batch must be the trainer's. Until then a job is
not done: files that do not load, or load as something else, are no product.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_train import checkpoint, failure, quantise
from lora_train.failure import Failure
from lora_train.plan import Plan

MOST_EXAMPLES = 4
MOST_TOKENS = 2048
# On a GPU the adapter is stored in bfloat16 and was trained in float32.
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
PATIENCE_SECONDS = 1200.0
PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """One sequence of the batch that both sides look at."""

    tokens: Sequence[int]
    trained: Sequence[int]


def batch_of(lengths: Sequence[int]) -> list[int]:
    """Which sequences to compare on: a few, and not more tokens than a moment takes."""
    chosen, left = [], MOST_TOKENS
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if len(chosen) == MOST_EXAMPLES or (chosen and lengths[i] > left):
            break
        chosen.append(i)
        left -= lengths[i]
    return chosen


def prove(
    plan: Plan,
    adapter: Path,
    parts: Sequence[Part],
    expected: float,
    alive: Callable[[], None] = lambda: None,
    on_host: bool = False,
) -> float:
    """The loss of the adapter as a fresh process reads it; Failure when it is not `expected`.

    `alive` runs several times a second and may raise; the process ends with it.
    `on_host` is for a base model that fits no single device.
    """
    asked = {
        "base": str(plan.base_model.path),
        "adapter": str(adapter),
        "device": "cpu" if on_host else plan.device,
        "half": plan.device == "cuda",
        "quantisation": plan.quantisation,
        "threads": plan.threads,
        "parts": [{"tokens": list(p.tokens), "trained": list(map(bool, p.trained))} for p in parts],
    }
    said, noise = ask("lora_train.reload", asked, alive, PATIENCE_SECONDS)
    if said is None:
        raise Failure("trainer_crashed", "the adapter could not be read again", detail=noise)
    if "kind" in said:
        raise Failure(said["kind"], f"the adapter on disk: {said['problem']}", detail=noise)
    loss = float(said["loss"])
    allowed = TOLERANCE[plan.device] * max(1.0, abs(expected))
    if not abs(loss - expected) <= allowed:
        raise Failure(
            "trainer_crashed",
            f"the adapter on disk has a loss of {loss:.6f}, the trained one {expected:.6f}",
        )
    return loss


def ask(
    module: str, question: dict[str, Any], alive: Callable[[], None], patience: float
) -> tuple[dict[str, Any] | None, str]:
    """What a fresh process answers, None when it does not; and what else it said."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=PACKAGE.parent,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
        )
        try:
            _hand(child, json.dumps(question))
            _wait(child, alive, patience)
        finally:
            child.kill()
            child.wait()
        out.seek(0)
        err.seek(0)
        noise = err.read().decode(errors="replace")[-8000:]
        try:
            said = json.loads(out.read().splitlines()[-1])
        except (ValueError, IndexError):
            return None, f"exit code {child.returncode}\n{noise}"
    return said, noise


def _hand(child: subprocess.Popen[bytes], question: str) -> None:
    if child.stdin is None:
        raise AssertionError("the process has no input")
    try:
        child.stdin.write(question.encode())
        child.stdin.close()
    except BrokenPipeError:
        pass  # it died; its exit code and its last words say why


def _wait(child: subprocess.Popen[bytes], alive: Callable[[], None], patience: float) -> None:
    waited = 0.0
    while waited < patience:
        try:
            child.wait(timeout=0.1)
            return
        except subprocess.TimeoutExpired:
            waited += 0.1
            alive()
    raise Failure("hang", f"reading the adapter again took more than {patience:.0f} s")


# --- In the fresh process ------------------------------------------------------


def measure(asked: dict[str, Any]) -> float:
    """The mean loss of an adapter directory on a batch; ValueError says what is wrong with it."""
    quantised = quantise.settings(asked["quantisation"], asked["device"])
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    where, device = Path(asked["adapter"]), asked["device"]
    checkpoint.verify(where)
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    stored = load_file(where / "adapter_model.safetensors")
    if not stored:
        raise ValueError("it has no weights")
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite")
    base = AutoModelForCausalLM.from_pretrained(
        asked["base"],
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.bfloat16 if asked["half"] else torch.float32,
        **quantised,
    )
    quantise.settle(base)
    model = PeftModel.from_pretrained(base, where).eval().to(device)
    wanted = {
        k: tuple(v.shape)
        for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    if wanted != {k: tuple(v.shape) for k, v in stored.items()}:
        odd = sorted(set(wanted) ^ set(stored))[:3] or ["shapes"]
        raise ValueError(f"its tensors do not fit the base model: {', '.join(odd)}")
    return mean_loss(model, asked["parts"], device)


def mean_loss(model: Any, parts: Sequence[dict[str, Any]], device: str) -> float:  # noqa: ANN401
    """The loss of a model on a batch, by its own forward pass."""
    import torch

    total, count = 0.0, 0
    for part in parts:
        tokens = torch.tensor(part["tokens"], device=device)
        keep = torch.tensor(part["trained"][1:], device=device)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=tokens.unsqueeze(0)).logits[0, :-1]
        picked, labels = logits[keep].float(), tokens[1:][keep]
        total += torch.nn.functional.cross_entropy(picked, labels, reduction="sum").item()
        count += len(labels)
    if not math.isfinite(total):
        raise ValueError("its loss is not finite")
    return total / count


def main() -> None:
    """Read the question from stdin, answer with one line of JSON."""
    answer(lambda asked: {"loss": measure(asked)})


def answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Be the process that was asked, and end."""
    try:
        said = work(json.load(sys.stdin))
    except (ValueError, checkpoint.Damaged) as e:
        said = {"kind": "trainer_crashed", "problem": failure.one_line(str(e))}
    except Exception as e:
        end = failure.classify(e)
        print(end.detail, file=sys.stderr)
        said = {"kind": end.kind, "problem": end.message}
    print(json.dumps(said), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
