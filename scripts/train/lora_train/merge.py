"""The base model with the adapter added to its weights, for who serves no adapters.

A fresh process loads both, adds in float32 and stores bfloat16, in files small
enough for Storage. It then loads what it wrote, and the loss on one batch must
be that of the adapter, up to what bfloat16 rounds away.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_train import checkpoint, reload
from lora_train.failure import Failure
from lora_train.plan import Plan

DIRECTORY = "merged"
PATIENCE_SECONDS = 4 * 3600.0
ROOM = 1 << 30  # bytes that stay free
# Weights of bfloat16 have eight bits: their roundings are most of the difference.
TOLERANCE = 5e-2


def write(
    plan: Plan,
    adapter: Path,
    parts: Sequence[reload.Part],
    expected: float,
    alive: Callable[[], None] = lambda: None,
) -> list[checkpoint.File]:
    """Write `merged/` into the adapter directory; its files, named from there.

    `expected` is the adapter's loss on the batch. Failure when there is no room,
    or when what was written is another model. `alive` runs several times a
    second and may raise.
    """
    base = plan.base_model.path
    needed = sum(p.stat().st_size for p in base.glob("*.safetensors")) + ROOM
    if (free := shutil.disk_usage(adapter).free) < needed:
        raise Failure(
            "disk_full",
            f"merged weights need {needed >> 30} GiB, and {free >> 30} GiB are free",
        )
    asked = {
        "base": str(base),
        "name": plan.base_model.name,
        "adapter": str(adapter),
        "device": plan.device,
        "threads": plan.threads,
        "file_bytes": plan.merged_file_bytes,
        "parts": [{"tokens": list(p.tokens), "trained": list(map(bool, p.trained))} for p in parts],
    }
    said, noise = reload.ask("lora_train.merge", asked, alive, PATIENCE_SECONDS)
    if said is None:
        raise Failure("trainer_crashed", "the weights could not be merged", detail=noise)
    if "kind" in said:
        raise Failure(said["kind"], f"merging the weights: {said['problem']}", detail=noise)
    if not abs(said["loss"] - expected) <= TOLERANCE * max(1.0, abs(expected)):
        shutil.rmtree(adapter / DIRECTORY, ignore_errors=True)
        raise Failure(
            "trainer_crashed",
            f"the merged model has a loss of {said['loss']:.4f}, the adapter {expected:.4f}",
        )
    return [
        checkpoint.File(f"{DIRECTORY}/{f['name']}", f["bytes"], f["sha256"]) for f in said["files"]
    ]


# --- In the fresh process ------------------------------------------------------


def merge(asked: dict[str, Any]) -> dict[str, Any]:
    """Write the merged model; its files and its loss on the batch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    adapter, device = Path(asked["adapter"]), asked["device"]
    target, temp = adapter / DIRECTORY, adapter.parent / f".tmp-{DIRECTORY}"
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    model = _added(asked)
    model.config._name_or_path = asked["name"]
    _save(model, temp, asked["file_bytes"])
    del model
    tokenizer = AutoTokenizer.from_pretrained(
        asked["base"], local_files_only=True, trust_remote_code=False
    )
    tokenizer.save_pretrained(temp)
    files = [_synced(p) for p in sorted(temp.iterdir())]
    manifest = {"v": checkpoint.VERSION, "step": 0, "files": [f.plain() for f in files]}
    (temp / checkpoint.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    files.append(_synced(temp / checkpoint.MANIFEST))
    shutil.rmtree(target, ignore_errors=True)
    temp.rename(target)
    again = AutoModelForCausalLM.from_pretrained(
        target,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.bfloat16,
    )
    loss = reload.mean_loss(again.eval().to(device), asked["parts"], device)
    return {"files": [f.plain() for f in files], "loss": loss}


def _added(asked: dict[str, Any]) -> Any:  # noqa: ANN401
    """The base model with the adapter added, in bfloat16, on the host."""
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        asked["base"],
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        # As it was in training, so that the sum is rounded once.
        dtype=torch.bfloat16 if asked["device"] == "cuda" else torch.float32,
    )
    model = PeftModel.from_pretrained(base, asked["adapter"])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                weight: Any = module.get_base_layer().weight
                delta = module.get_delta_weight("default").float()  # pyright: ignore[reportCallIssue]
                weight.data = (weight.data.float() + delta).to(torch.bfloat16)
    return model.unload().to(torch.bfloat16)


def _save(model: Any, where: Path, file_bytes: int) -> None:  # noqa: ANN401
    size = f"{max(1, file_bytes // 1000)}KB"
    try:
        model.save_pretrained(where, max_shard_size=size)
    except ValueError:
        # Some models bring settings for sampling that their own library refuses to write.
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig()
        model.save_pretrained(where, max_shard_size=size)


def _synced(path: Path) -> checkpoint.File:
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        os.fsync(f.fileno())
    return checkpoint.File(path.name, path.stat().st_size, digest)


def main() -> None:
    """Read the question from stdin, answer with one line of JSON."""
    reload.answer(merge)


if __name__ == "__main__":
    main()
