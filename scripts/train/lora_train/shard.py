"""A frozen base model that is too large for one device, spread over all of them.

Every rank holds a part of each layer and fetches the rest when the layer runs.
The adapter is not spread: each rank has all of it, so gradients, checkpoints
and the product are what they are otherwise. Ranks then go through layers at the
same time, and a rank that runs out of memory cannot do its part in smaller
pieces: that ends the training.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lora_train.plan import Plan

if TYPE_CHECKING:
    import torch

# Of a device: the rest is for the adapter, its moments, activations and libraries.
MOST = 0.8


def wanted(plan: Plan) -> bool:
    """Whether the plan says so, or the weights leave too little room on one device."""
    if plan.quantisation != "none":  # a quarter of the size, and not to be taken apart
        return False
    if plan.devices == 1 or plan.shard or plan.device != "cuda":
        return plan.devices > 1 and plan.shard
    import torch

    return weight_bytes(plan) > MOST * torch.cuda.get_device_properties(0).total_memory


def slow(plan: Plan) -> tuple[str, ...]:
    """The paths that are left out: they use weights at times when those are elsewhere."""
    from lora_train import fast

    return (*plan.slow_paths, *fast.PATHS)


def weight_bytes(plan: Plan) -> int:
    """Bytes of the base model as it is loaded on a GPU: two for a number."""
    total = 0
    for file in plan.base_model.path.glob("*.safetensors"):
        with file.open("rb") as f:
            head = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        head.pop("__metadata__", None)
        total += sum(2 * _count(tensor["shape"]) for tensor in head.values())
    return total


def _count(shape: list[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def spread(model: Any, device: str) -> None:  # noqa: ANN401
    """Keep this rank's part of the base model on its device; every rank must call it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    trained: set[torch.nn.Parameter] = {p for p in model.parameters() if p.requires_grad}
    for p in trained:
        p.data = p.data.to(device)
    blocks = set(model.get_base_model()._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, ignored_params=trained & set(module.parameters()))
    # The whole model and not the base in it: peft calls that one's forward without its hooks.
    # Given back after each use: rank 0 alone reads the state, and that would give it back there.
    fully_shard(model, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
