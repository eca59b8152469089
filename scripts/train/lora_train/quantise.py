"""QLoRA: the linear layers of the frozen base model in four bits (NF4, double quantised).

Embeddings, norms and the head stay as they are, and so does the adapter: what
comes out is a plain adapter of the same base model. The library is an extra of
this package, wanted by nothing else.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from lora_train.failure import Failure

LIBRARY = "bitsandbytes"


def settings(quantisation: str, device: str) -> dict[str, Any]:
    """What `from_pretrained` must be given; Failure when the library is missing here."""
    if quantisation == "none":
        # peft imports the library wherever it is installed, and that takes five seconds.
        sys.modules.setdefault(LIBRARY, None)  # pyright: ignore[reportArgumentType]
        return {}
    if importlib.util.find_spec(LIBRARY) is None:
        raise Failure(
            "device_unavailable",
            f"this host cannot train in four bits: {LIBRARY} is not installed",
            "Install scripts/train/qlora.lock into the trainer's environment,"
            " or leave quantisation out.",
        )
    import torch
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantisation,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        )
    }


def settle(base: Any) -> None:  # noqa: ANN401
    """Keep the layers from packing their weights anew whenever the CPU evaluates."""
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
