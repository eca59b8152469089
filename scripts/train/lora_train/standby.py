"""A trainer that has imported everything and waits for its one plan.

Importing takes longer than all else before the first step of a small model.
Nothing here touches a device: which one it will be is in the environment that
comes with the plan, and no driver has looked at that before.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lora_train import plan
from lora_train.failure import Failure

JOB_FD = 5
LONGEST = 1 << 20  # bytes of a job


@dataclass(frozen=True)
class Job:
    """What a standby is told: the plan file, and variables that are the job's own."""

    plan: Path
    env: dict[str, str]


def warm() -> None:
    """Import what a training needs; no device is asked for anything."""
    from lora_train import quantise

    quantise.settings("none", "cpu")
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from lora_train import loop, reload  # noqa: F401


def wait(fd: int = JOB_FD) -> Job | None:
    """The job that is written to `fd` as one line of JSON; None when its other end closes."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(fd, 1 << 16)
        if not part or len(line) > LONGEST:
            return None
        line += part
    os.close(fd)
    said = json.loads(line)
    return Job(Path(said["plan"]), {str(k): str(v) for k, v in said.get("env", {}).items()})


def fit(job: Job) -> bool:
    """False for a plan that wants a library which is hidden from this process."""
    try:
        return plan.read(job.plan).get("quantisation", "none") == "none"
    except Failure:
        return True  # the trainer itself says what is wrong with the plan


def become(job: Job) -> None:
    """Take on the job's environment."""
    os.environ.update(job.env)
    tempfile.tempdir = None  # it was looked up for another TMPDIR
