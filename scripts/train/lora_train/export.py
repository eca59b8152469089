"""The product: an adapter directory that peft, vLLM and others read."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_train import checkpoint
from lora_train.plan import Plan

if TYPE_CHECKING:
    import torch


def write(
    plan: Plan,
    model: torch.nn.Module,
    tokenizer: Any,  # noqa: ANN401
    samples: list[str],
    report: dict[str, Any],
) -> checkpoint.Saved:
    """Write the adapter directory under the run directory."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    dtype = torch.bfloat16 if plan.device == "cuda" else torch.float32
    state = get_peft_model_state_dict(model)
    weights = {k: v.detach().to("cpu", dtype).contiguous() for k, v in sorted(state.items())}
    files = {
        "adapter_model.safetensors": save(weights, metadata={"format": "pt"}),
        "adapter_config.json": _json(_config(plan, model)),
        **_tokenizer_files(tokenizer),
        "README.md": _card(plan, report).encode(),
        "training_report.json": _json(report),
        "training_samples.txt": "\n\n----\n\n".join(samples).encode(),
    }
    return checkpoint.write(plan.run_dir / "adapter", report["steps"], files)


def _config(plan: Plan, model: Any) -> dict[str, Any]:  # noqa: ANN401
    config = model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = plan.base_model.name
    config["target_modules"] = sorted(config["target_modules"])
    config["inference_mode"] = True
    return config


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:  # noqa: ANN401
    with tempfile.TemporaryDirectory() as where:
        tokenizer.save_pretrained(where)
        return {p.name: p.read_bytes() for p in sorted(Path(where).iterdir()) if p.is_file()}


def _json(value: Any) -> bytes:  # noqa: ANN401
    return (json.dumps(value, indent=2, default=_listed) + "\n").encode()


def _listed(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _card(plan: Plan, report: dict[str, Any]) -> str:
    h = plan.hyperparameters
    lines = [
        "---",
        f"base_model: {plan.base_model.name}",
        "library_name: peft",
        "---",
        f"# LoRA adapter for {plan.base_model.name}",
        "",
        f"- rank {h.rank}, alpha {h.alpha:g}, dropout {h.dropout:g}, all linear layers",
        f"- learning rate {h.learning_rate:g} (cosine), {h.batch_size} examples a step, "
        f"{h.epochs} epochs, {report['steps']} steps",
        f"- {report['examples']} training and {report['validation_examples']} validation examples, "
        f"data sha256 {plan.data.sha256}",
        f"- training loss {report['training_loss']}, validation loss {report['validation_loss']} "
        f"(before training {report['base_validation_loss']})",
        "",
        "Loss is taken on the assistant's text alone; `training_samples.txt` shows three examples",
        "as the model saw them, with « » around what was trained on.",
        "",
    ]
    return "\n".join(lines)
