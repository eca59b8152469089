"""Lorayard's LoRA trainer: a plan file in, events out, exact resume."""

__version__ = "0.1.0"
