"""The base model from local safetensors, and the LoRA adapter on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_train import quantise
from lora_train.failure import Failure
from lora_train.plan import Plan

if TYPE_CHECKING:
    import torch

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_files(path: Path) -> dict[str, Any]:
    """The model's config; Failure for files that are missing or could run code."""
    config = path / "config.json"
    if not config.is_file():
        raise Failure("input_missing", f"base model {path.name} has no config.json")
    settings = json.loads(config.read_text())
    if "auto_map" in settings:
        raise Failure(
            "plan_invalid",
            "the base model brings code of its own, which is not run here",
            "Choose a base model that the library knows.",
        )
    if not any(path.glob("*.safetensors")):
        pickled = any(p.suffix in PICKLED for p in path.iterdir())
        raise Failure(
            "plan_invalid" if pickled else "input_missing",
            "the base model has no safetensors weights"
            + (", only pickled ones" if pickled else ""),
            "Convert its weights to safetensors.",
        )
    return settings


def tokenizer_of(path: Path) -> Any:  # noqa: ANN401
    """The tokenizer that stands beside the weights."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def load(plan: Plan, on_host: bool = False) -> torch.nn.Module:
    """The base model with a fresh adapter, on the plan's device, base weights frozen.

    With `on_host` it stays in the host's memory, where its files are only mapped.
    """
    quantised = quantise.settings(plan.quantisation, plan.device)  # before peft is imported
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if plan.device == "cuda" and not torch.cuda.is_available():
        raise Failure("device_unavailable", "torch finds no CUDA device")
    base = AutoModelForCausalLM.from_pretrained(
        plan.base_model.path,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.bfloat16 if plan.device == "cuda" else torch.float32,
        **quantised,
    )
    quantise.settle(base)
    base.config.use_cache = False
    h = plan.hyperparameters
    torch.manual_seed(h.seed)
    config = LoraConfig(
        r=h.rank,
        lora_alpha=h.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=h.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        bias="none",
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as e:
        # Mamba's kernels take weights past their layers: an adapter there would do nothing.
        raise Failure(
            "plan_invalid",
            f"a base model of this kind takes no adapter on all linear layers: {e}",
            "Choose a base model of another kind.",
        ) from e
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model if on_host else model.to(plan.device)


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by name, in a fixed order."""
    return {n: p for n, p in sorted(model.named_parameters()) if p.requires_grad}
