"""Does the device compute what it should? Asked before a training is trusted to it.

A GPU can be healthy by all its counters and still give wrong numbers. Matrix
products are what a training does all day, so that is what is looked at: each
product is checked against one with a vector, `A(Bx) = (AB)x` (Freivalds), which
costs next to nothing and notices a single wrong element, and made twice, which
must give the same bits. Copies inside the device's memory show whether that is
as fast as it should be, and whether it keeps what is put there.

A second is all that it may take, after what a process must do once anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_train.failure import Failure

if TYPE_CHECKING:
    import torch

    from lora_train.session import Session

Multiply = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]

PRODUCTS = 32  # different ones, each made twice
SECONDS = 0.6  # no new product after
HINT = "The device is taken out of use; the job goes on by itself on another one."


@dataclass(frozen=True)
class Sizes:
    """How much is computed: n of the square matrices, bytes of a copy."""

    n: int
    copy_bytes: int


CUDA = Sizes(n=8192, copy_bytes=1 << 30)
CPU = Sizes(n=128, copy_bytes=1 << 22)  # only to have looked at all


@dataclass(frozen=True)
class Report:
    """What was found on one device; rates are 0 where nothing could be measured."""

    wrong: str  # empty: all was well
    check: str  # what found it: product, repeat or copy
    flops: float  # floating-point operations a second
    copy_bytes_per_second: float  # read and written
    seconds: float


def check(session: Session) -> None:
    """Look at every device of the plan, tell each, and raise a Failure if one is bad."""
    import torch

    cuda = session.plan.device.startswith("cuda")
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if cuda else ["cpu"]
    bad = ""
    for index, name in enumerate(names):
        session.stop.check()
        report = look(torch.device(name), CUDA if cuda else CPU)
        session.emit.send(
            "sanity",
            index=index,
            device=name,
            wrong=report.wrong,
            check=report.check,
            flops=report.flops,
            copy_bytes_per_second=report.copy_bytes_per_second,
            seconds=report.seconds,
        )
        bad = bad or (f"{name}: {report.wrong}" if report.wrong else "")
    if bad:
        raise Failure("gpu_fault", f"a device failed its check, {bad}", HINT)


def look(device: torch.device, sizes: Sizes, multiply: Multiply | None = None) -> Report:
    """Check one device; `multiply` is the product that is looked at."""
    import torch

    multiply = multiply or torch.matmul
    began = time.perf_counter()
    generator = torch.Generator(device).manual_seed(0x10A)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    n = sizes.n
    with torch.no_grad():
        # Of -1, 0 and 1, and mostly 0: every sum stays below 256, so that it is exact in bfloat16
        # as in float32, in whatever order it is added. A product has one right answer.
        a = _sparse(generator, n, device).to(dtype)
        b = _sparse(generator, n, device).to(dtype)
        multiply(a, b)  # the library chooses its ways once
        _wait(device)
        wrong, kind, done, spent = _products(generator, a, b, multiply, began)
        del a, b
        copied, rate = _copies(generator, device, sizes.copy_bytes)
        if copied and not wrong:
            wrong, kind = copied, "copy"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    flops = 2.0 * n**3 * done / spent if spent > 0 else 0.0
    return Report(wrong, kind, flops, rate, time.perf_counter() - began)


def _sparse(generator: torch.Generator, n: int, device: torch.device) -> torch.Tensor:
    import torch

    dice = torch.randint(0, 6, (n, n), generator=generator, device=device, dtype=torch.int8)
    return (dice == 1).to(torch.int8) - (dice == 0).to(torch.int8)


def _signs(generator: torch.Generator, n: int, device: torch.device) -> torch.Tensor:
    """Columns of -1 and 1: a single wrong element shows in each, two that cancel not in all."""
    import torch

    dice = torch.randint(0, 2, (n, 8), generator=generator, device=device, dtype=torch.int8)
    return (2 * dice - 1).to(torch.float32)


def _products(
    generator: torch.Generator, a: torch.Tensor, b: torch.Tensor, multiply: Multiply, began: float
) -> tuple[str, str, int, float]:
    """What was wrong, by which check, how many products, and the seconds that they took."""
    import torch

    done, spent, bad, differ = 0, 0.0, 0, 0
    for i in range(PRODUCTS):
        if done and time.perf_counter() - began > SECONDS:
            break
        left = a.roll(i, 0)  # another product each time, of the same numbers
        start = time.perf_counter()
        once, again = multiply(left, b), multiply(left, b)
        _wait(a.device)
        spent += time.perf_counter() - start
        done += 2
        differ += int(not torch.equal(once, again))
        x = _signs(generator, a.shape[0], a.device)
        right = left.float() @ (b.float() @ x)
        bad += int(not torch.equal(right, once.float() @ x))
    if bad:
        return f"{bad} of {done // 2} matrix products were wrong", "product", done, spent
    if differ:
        said = f"{differ} of {done // 2} matrix products came out differently twice"
        return said, "repeat", done, spent
    return "", "", done, spent


def _copies(generator: torch.Generator, device: torch.device, size: int) -> tuple[str, float]:
    """What was wrong, and the bytes a second that were read and written."""
    import torch

    low, high = -(1 << 31), 1 << 31
    source = torch.randint(
        low, high, (size // 4,), generator=generator, device=device, dtype=torch.int32
    )
    target = torch.empty_like(source)
    target.copy_(source)
    _wait(device)
    start = time.perf_counter()
    times = 4
    for _ in range(times):
        target.copy_(source)
    _wait(device)
    rate = 2.0 * size * times / (time.perf_counter() - start)
    if not torch.equal(source, target):
        return "a copy inside the device's memory was wrong", rate
    part = source[: min(size, 1 << 25) // 4]
    if not torch.equal(part.to("cpu").to(device), part):
        return "a copy to the host and back was wrong", rate
    return "", rate


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
