"""What is told about a training beside its weights: data, settings, a model card.

Names and figures only: no path of this host, and of the data no more than the
samples that the log shows anyway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lora_train import __version__, render
from lora_train.conversation import Conversation
from lora_train.plan import Plan
from lora_train.prepare import Prepared

MOST_LINES = 1000  # that are named
SAMPLES_NOTE = (
    f"as it sees it; the text between {render.OPEN} and {render.CLOSE} is what the loss is taken on"
)


OVERFIT = {
    "yes": "yes: validation loss rose while training loss fell",
    "no": "no",
    "unknown": "unknown, for want of validation examples",
}


def data_report(plan: Plan, ready: Prepared, epoch_tokens: int) -> dict[str, Any]:
    """What the model was trained on; `epoch_tokens` were computed in the first epoch."""
    apart = ready.tokens_apart
    return {
        "data_sha256": plan.data.sha256,
        "max_seq_length": plan.hyperparameters.max_seq_length,
        "training": _figures(ready.train),
        "validation": _figures(ready.held),
        "split": {
            "validation_fraction": plan.validation_fraction,
            "seed": plan.hyperparameters.seed,
            "by": "conversation",
            "validation_lines": sorted(p.line for c in ready.held for p in c.parts),
        },
        "merging": {
            "note": "examples of one conversation are computed as one sequence",
            "on": plan.data.merge,
            "sequences": len(ready.train),
            "tokens_an_epoch": epoch_tokens,
            "tokens_an_epoch_without": apart,
            "saved": round(1 - epoch_tokens / max(1, apart), 4),
            "not_merged": _listed(ready.apart),
        },
        "too_long": plan.data.too_long,
        "shortened": _listed(ready.shortened),
        "dropped": _listed(ready.dropped),
        "samples": {"note": SAMPLES_NOTE, "texts": list(ready.samples)},
    }


def samples(texts: Sequence[str]) -> bytes:
    """The samples as a file for people."""
    rule = "\n" + "-" * 80 + "\n"
    shown = "".join(f"{rule}sample {n}{rule}{text}\n" for n, text in enumerate(texts, 1))
    return f"What the model is trained on, {SAMPLES_NOTE}.\n{shown}".encode()


def _listed(lines: Sequence[int]) -> dict[str, Any]:
    return {"count": len(lines), "lines": sorted(lines)[:MOST_LINES]}


def _figures(those: Sequence[Conversation]) -> dict[str, Any]:
    examples = [c.cut(n, n + 1) for c in those for n in range(len(c.parts))]
    lengths = sorted(len(s.tokens) for s in examples)
    if not lengths:
        return {"examples": 0, "tokens": 0, "loss_tokens": 0}

    def share(q: float) -> int:
        return lengths[min(len(lengths) - 1, int(q * len(lengths)))]

    return {
        "examples": len(examples),
        "sequences": len(those),
        "tokens": sum(len(c.tokens) for c in those),
        "loss_tokens": sum(s.loss_tokens for s in examples),
        "tokens_an_example": {"p50": share(0.5), "p90": share(0.9), "most": lengths[-1]},
    }


def training_args(plan: Plan, versions: Mapping[str, str], fixed: Mapping[str, Any]) -> dict:
    """Every setting that the result follows from; `fixed` are those that no plan sets."""
    return {
        "trainer": __version__,
        "libraries": dict(versions),
        "device": plan.device,
        "base_model": plan.base_model.name,
        "data_sha256": plan.data.sha256,
        "validation_fraction": plan.validation_fraction,
        "too_long": plan.data.too_long,
        "merge": plan.data.merge,
        **asdict(plan.hyperparameters),
        **fixed,
    }


def card(plan: Plan, outcome: Mapping[str, Any], ready: Prepared) -> str:
    """The model card, with the front matter that model hubs read."""
    h, name = plan.hyperparameters, plan.base_model.name
    lines = [
        "---",
        f"base_model: {json.dumps(name)}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [lora]",
        "---",
        f"# LoRA adapter for {name}",
        "",
        "| | |",
        "|---|---|",
        f"| rank, alpha, dropout | {h.rank}, {h.alpha:g}, {h.dropout:g}; all linear layers |",
        f"| learning rate | {h.learning_rate:g}, {h.warmup_steps} steps of warm-up, cosine |",
        f"| optimizer | AdamW, weight decay {h.weight_decay:g} |",
        f"| steps | {outcome['steps']} of {h.batch_size} examples, {outcome['epochs']:g} epochs"
        f" of {h.epochs} |",
        f"| weights | {_weights(outcome)} |",
        f"| examples | {outcome['examples']} for training, "
        f"{outcome['validation_examples']} for validation |",
        f"| longer than {ready.longest} tokens | {len(ready.shortened)} lost {ready.loses}, "
        f"{len(ready.dropped)} are left out |",
        f"| data | sha256 {plan.data.sha256} |",
        f"| training loss | {_said(outcome['training_loss'])} |",
        f"| validation loss | {_said(outcome['validation_loss'])}, "
        f"before training {_said(outcome['base_validation_loss'])} |",
        f"| overfit | {OVERFIT[outcome['overfit']]} |",
        "",
        "Loss is the mean negative log likelihood of a token, in nats, taken on the assistant's",
        "text alone. `samples.txt` shows what the model saw, `data_report.json` tells of the data,",
        "`metrics.jsonl` every step, `training_args.json` every setting.",
        "",
        "![loss by step](loss.png)",
        "",
    ]
    return "\n".join(lines)


def _weights(outcome: Mapping[str, Any]) -> str:
    step = outcome["adapter_step"]
    return f"of step {step}" + (
        "" if step == outcome["steps"] else ", where the validation loss was lowest"
    )


def _said(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.4f}"
