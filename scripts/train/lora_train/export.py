"""The product: an adapter directory that peft, vLLM and others read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
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
    report: dict[str, Any],
    beside: Mapping[str, bytes],
) -> checkpoint.Saved:
    """Write the adapter directory under the run directory, with the files `beside` in it."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    dtype = torch.bfloat16 if plan.device == "cuda" else torch.float32
    state = get_peft_model_state_dict(model)
    weights = {k: v.detach().to("cpu", dtype).contiguous() for k, v in sorted(state.items())}
    files = {
        "adapter_model.safetensors": save(weights, metadata={"format": "pt"}),
        "adapter_config.json": as_json(_config(plan, model)),
        **_tokenizer_files(tokenizer),
        **beside,
        "training_report.json": as_json(report),
    }
    return checkpoint.write(plan.run_dir / "adapter", report["steps"], files)


def _config(plan: Plan, model: Any) -> dict[str, Any]:  # noqa: ANN401
    config = model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = plan.base_model.name
    config["target_modules"] = _short(model)
    config["inference_mode"] = True
    # vLLM declares this an integer.
    if float(config["lora_alpha"]).is_integer():
        config["lora_alpha"] = int(config["lora_alpha"])
    return config


def _short(model: torch.nn.Module) -> list[str]:
    """The adapted modules by their last names, as servers want them.

    peft may list every module with its whole path; LoRAX then finds none. Whole
    paths stay where a last name would also mean a module without an adapter.
    """
    names = [n for n, _ in model.named_modules()]
    adapted = {n.removesuffix(".lora_A") for n in names if n.endswith(".lora_A")}
    short = {n.rsplit(".", 1)[-1] for n in adapted}
    meant = {n for n in names if n.rsplit(".", 1)[-1] in short and ".base_layer" not in n}
    if meant == adapted:
        return sorted(short)
    return sorted(n.removeprefix("base_model.model.") for n in adapted)


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:  # noqa: ANN401
    with tempfile.TemporaryDirectory() as where:
        tokenizer.save_pretrained(where)
        return {p.name: p.read_bytes() for p in sorted(Path(where).iterdir()) if p.is_file()}


def as_json(value: Any) -> bytes:  # noqa: ANN401
    """The value as a file for people."""
    return (json.dumps(value, indent=2, ensure_ascii=False, default=_listed) + "\n").encode()


def _listed(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
