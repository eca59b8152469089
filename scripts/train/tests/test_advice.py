"""Advice is given where it helps, and a training that went wrong is called so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_train import advice, verdict

SOUND = advice.Facts("llama", 8_000_000_000, 2e-4, 16, 0.0, 500, 5000, True)


@pytest.mark.parametrize(
    ("over", "code", "words"),
    [
        ({}, "", ""),
        ({"learning_rate": 5e-5}, "advice_learning_rate", "6 times below 0.0003"),
        ({"learning_rate": 2e-3}, "advice_learning_rate", "7 times above 0.0003"),
        ({"learning_rate": 1.4e-3}, "", ""),  # within five times
        ({"model_type": "qwen3", "learning_rate": 1e-4}, "advice_learning_rate", "below 0.001"),
        ({"model_type": "who knows", "learning_rate": 4e-5}, "", ""),
        ({"steps": 99}, "advice_steps", "smaller batch"),
        ({"steps": 99, "batch_size": 4}, "advice_steps", "train for more epochs"),
        ({"examples": 49}, "advice_examples", "49 examples"),
        ({"batch_size": 33}, "advice_batch", "this one is 33"),
        ({"dropout": 0.1}, "advice_dropout", "0 is quicker"),
        ({"dropout": 0.1, "cuda": False}, "", ""),
    ],
)
def test_advice(over: dict, code: str, words: str) -> None:
    said = advice.advise(replace(SOUND, **over))
    assert [c for c, _ in said] == [code] * bool(code)
    assert all(words in text for _, text in said)


def test_rates_go_by_family_and_size() -> None:
    rate = advice.learning_rate
    assert rate("llama", 1_200_000_000) == 1e-3 and rate("llama", 70_000_000_000) == 3e-4
    assert rate("qwen3", 8_000_000_000) == 1e-3 and rate("qwen3", 32_000_000_000) == 3e-4
    sizes = (1_000_000_000, 8_000_000_000, 32_000_000_000)
    assert [rate("other", n) for n in sizes] == [5e-4, 2e-4, 1e-4]


FALLING = [(n, 3.0 - n / 50) for n in range(1, 101)]
FLAT = [(n, 2.0) for n in range(1, 101)]
RISING = [(n, 2.0 + n / 50) for n in range(1, 101)]


@pytest.mark.parametrize(
    ("evaluations", "samples", "base", "said"),
    [
        ([], FALLING, None, "unknown"),
        ([], FALLING, 3.0, "unknown"),
        ([(50, 2.0)], FALLING, None, "unknown"),
        ([(50, 2.0), (100, 1.5)], FALLING, 3.0, "no"),
        ([(50, 2.0), (100, 2.5)], FALLING, 3.0, "yes"),
        ([(50, 2.0), (100, 2.5)], FALLING, None, "yes"),
        # Within the noise, and back again.
        ([(50, 2.0), (100, 2.03)], FALLING, 3.0, "no"),
        ([(25, 2.0), (50, 2.5), (75, 2.5), (100, 1.9)], FALLING, 3.0, "no"),
        # Worse than the base model from the first evaluation on.
        ([(50, 3.5), (100, 4.0)], FALLING, 3.0, "yes"),
        ([(100, 3.5)], FALLING, 3.0, "yes"),
        # Validation rises, but nothing was learned by heart.
        ([(50, 2.0), (100, 2.5)], RISING, 3.0, "no"),
        ([(50, 3.5), (100, 4.0)], FLAT, 3.0, "no"),
        ([(100, 3.5)], RISING, 3.0, "no"),
        ([(50, 2.0), (100, 2.5)], [], 3.0, "unknown"),
    ],
)
def test_overfit(
    evaluations: list[tuple[int, float]],
    samples: list[tuple[int, float]],
    base: float | None,
    said: str,
) -> None:
    assert verdict.overfit(evaluations, samples, base) == said
