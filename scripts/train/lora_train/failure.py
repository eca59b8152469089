"""What can go wrong, under the names and exit codes of the protocol.

Every room raises what it knows best; `classify` turns any exception into one
`Failure` at the single place where the process ends.
"""

from __future__ import annotations

import errno
import sys
import traceback

OK = 0

EXIT_CODES = {
    "plan_invalid": 64,
    "dataset_invalid": 65,
    "input_missing": 66,
    "device_unavailable": 69,
    "trainer_crashed": 70,
    "gpu_fault": 71,
    "disk_full": 73,
    "preempted": 75,
    "out_of_memory": 81,
    "diverged": 82,
    "hang": 83,
}

HINTS = {
    "plan_invalid": "Correct the named settings and start the job again.",
    "dataset_invalid": "Correct the named lines of the data file and upload it again.",
    "input_missing": "Fetch the missing file again and retry the attempt.",
    "device_unavailable": "Run the job on a host whose device works.",
    "trainer_crashed": "Read the detail and the trainer's log; this is a bug.",
    "gpu_fault": "Check the device with its driver's tools before it is used again.",
    "disk_full": "Free space on the host's run directory and retry.",
    "preempted": "Start again from the last checkpoint.",
    "out_of_memory": "Lower max_seq_length or rank, or use a device with more memory.",
    "diverged": "Lower the learning rate or add warm-up steps.",
    "hang": "Look at the stacks in the trainer's log, then retry.",
}

KINDS = {code: kind for kind, code in EXIT_CODES.items()}


class Failure(Exception):
    """An end of the training that has a kind of its own."""

    def __init__(self, kind: str, message: str, hint: str = "", detail: str = "") -> None:
        if kind not in EXIT_CODES:
            raise ValueError(f"{kind!r} is not a kind of failure")
        super().__init__(message)
        self.kind = kind
        self.message = one_line(message)
        self.hint = one_line(hint) or HINTS[kind]
        self.detail = detail

    @property
    def code(self) -> int:
        """The exit code that the protocol gives to this kind."""
        return EXIT_CODES[self.kind]


def one_line(text: str) -> str:
    """The text without line breaks, for the fields that a user reads."""
    return " ".join(text.split())


def classify(exc: BaseException) -> Failure:
    """Name the kind of any exception; torch is only asked when it was imported."""
    if isinstance(exc, Failure):
        return exc
    detail = "".join(traceback.format_exception(exc))
    said = f"{type(exc).__name__}: {one_line(str(exc))}"
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure("disk_full", f"no room left for {exc.filename or 'a file'}", detail=detail)
    if isinstance(exc, FileNotFoundError):
        return Failure("input_missing", f"file not found: {exc.filename}", detail=detail)
    if is_out_of_memory(exc):
        return Failure("out_of_memory", "the training does not fit into memory", detail=detail)
    if _is_gpu_fault(exc):
        return Failure("gpu_fault", said, detail=detail)
    return Failure("trainer_crashed", said, detail=detail)


def is_out_of_memory(exc: BaseException) -> bool:
    """True for every way in which host or device memory runs out."""
    if isinstance(exc, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(exc, torch.OutOfMemoryError):
        return True
    return isinstance(exc, RuntimeError) and "can't allocate memory" in str(exc)


def _is_gpu_fault(exc: BaseException) -> bool:
    torch = sys.modules.get("torch")
    accelerator = getattr(torch, "AcceleratorError", None)
    if accelerator is not None and isinstance(exc, accelerator):
        return True
    words = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL", "uncorrectable ECC")
    return isinstance(exc, RuntimeError) and any(w in str(exc) for w in words)
