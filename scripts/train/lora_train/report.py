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
from lora_train.plan import Plan

MOST_LINES = 1000  # of dropped lines that are named


def data_report(
    plan: Plan,
    train: Sequence[render.Sequence],
    held: Sequence[render.Sequence],
    dropped: Sequence[int],
    samples: Sequence[str],
) -> dict[str, Any]:
    """What the model was trained on; `dropped` are the lines that were left out."""
    return {
        "data_sha256": plan.data.sha256,
        "max_seq_length": plan.hyperparameters.max_seq_length,
        "training": _figures(train),
        "validation": _figures(held),
        "split": {
            "validation_fraction": plan.validation_fraction,
            "seed": plan.hyperparameters.seed,
            "by": "conversation",
            "validation_lines": sorted(s.line for s in held),
        },
        "dropped": {"count": len(dropped), "lines": sorted(dropped)[:MOST_LINES]},
        "samples": {
            "note": f"as the model sees them; the text between {render.OPEN} and "
            f"{render.CLOSE} is what it is trained on",
            "texts": list(samples),
        },
    }


def _figures(sequences: Sequence[render.Sequence]) -> dict[str, Any]:
    lengths = sorted(len(s.tokens) for s in sequences)
    if not lengths:
        return {"examples": 0, "tokens": 0, "loss_tokens": 0}

    def share(q: float) -> int:
        return lengths[min(len(lengths) - 1, int(q * len(lengths)))]

    return {
        "examples": len(sequences),
        "tokens": sum(lengths),
        "loss_tokens": sum(s.loss_tokens for s in sequences),
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
        **asdict(plan.hyperparameters),
        **fixed,
    }


def card(plan: Plan, outcome: Mapping[str, Any]) -> str:
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
        f"| data | sha256 {plan.data.sha256} |",
        f"| training loss | {_said(outcome['training_loss'])} |",
        f"| validation loss | {_said(outcome['validation_loss'])}, "
        f"before training {_said(outcome['base_validation_loss'])} |",
        "",
        "Loss is the mean negative log likelihood of a token, in nats, taken on the assistant's",
        "text alone. `data_report.json` shows three examples as the model saw them,",
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
