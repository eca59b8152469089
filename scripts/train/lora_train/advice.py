"""What an experienced person would say about a plan. Nothing is ever changed by it.

The rates are those at which LoRA on all linear layers did best in public sweeps
(Llama, Qwen3, gpt-oss, DeepSeek-V3); for other models a cautious one by size.
They depend little on the rank, and a factor of two on the rest. So only what is
far off is worth a word.
"""

from __future__ import annotations

from dataclasses import dataclass

FAR = 5.0  # times above or below
FEW_STEPS = 100
FEW_EXAMPLES = 50
LARGE_BATCH = 32
SMALL_BATCH = 4

BILLION = 1e9
# By the model's type: up to how many parameters, and the rate for these.
RATES: dict[str, tuple[tuple[float, float], ...]] = {
    "llama": ((4 * BILLION, 1e-3), (float("inf"), 3e-4)),
    "qwen3": ((14 * BILLION, 1e-3), (float("inf"), 3e-4)),
    "qwen3_moe": ((100 * BILLION, 1e-3), (float("inf"), 3e-4)),
    "gpt_oss": ((40 * BILLION, 1e-4), (float("inf"), 3e-4)),
    "deepseek_v3": ((float("inf"), 4e-4),),
}
OTHERS = ((4 * BILLION, 5e-4), (14 * BILLION, 2e-4), (float("inf"), 1e-4))


@dataclass(frozen=True)
class Facts:
    """What the advice follows from; `parameters` are those of the base model."""

    model_type: str
    parameters: int
    learning_rate: float
    batch_size: int
    dropout: float
    steps: int
    examples: int
    cuda: bool = False


def learning_rate(model_type: str, parameters: int) -> float:
    """The rate that we would begin with."""
    for most, rate in RATES.get(model_type, OTHERS):
        if parameters <= most:
            return rate
    raise AssertionError("the last row has no limit")


def advise(f: Facts) -> list[tuple[str, str]]:
    """(code, text) of all that is worth a word."""
    out = []
    usual = learning_rate(f.model_type, f.parameters)
    times = f.learning_rate / usual
    if not 1 / FAR <= times <= FAR:
        odd = f"{times:.0f} times above" if times > 1 else f"{1 / times:.0f} times below"
        risk = "it may diverge" if times > 1 else "it may learn little"
        out.append(
            (
                "advice_learning_rate",
                f"the learning rate {f.learning_rate:g} is {odd} {usual:g}, which does well for "
                f"{f.model_type} models of {f.parameters / BILLION:.1f} billion parameters: {risk}",
            )
        )
    if f.examples < FEW_EXAMPLES:
        said = f"{f.examples} examples teach a form, hardly more: {FEW_EXAMPLES} or more are better"
        out.append(("advice_examples", said))
    if f.steps < FEW_STEPS:
        how = "train for more epochs"
        if f.batch_size > SMALL_BATCH:
            how = f"choose a smaller batch ({SMALL_BATCH} at least) or {how}"
        said = f"there are only {f.steps} steps, and {FEW_STEPS} or more are better: {how}"
        out.append(("advice_steps", said))
    if f.batch_size > LARGE_BATCH:
        said = f"LoRA learns less from batches above {LARGE_BATCH} than from more, smaller steps"
        out.append(("advice_batch", f"{said}: this one is {f.batch_size}"))
    if f.dropout > 0 and f.cuda:
        said = f"a dropout of {f.dropout:g} keeps the adapter from its fast path: 0 is quicker"
        out.append(("advice_dropout", f"{said}, and seldom worse"))
    return out
