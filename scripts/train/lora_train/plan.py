"""The plan file: what the agent wants trained, checked completely before anything runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lora_train.failure import Failure

VERSION = 1
TOO_LONG = ("truncate_history", "drop", "error")
# What can be told to go the slow way, which is right for every model.
SLOW_PATHS = ("packing", "head", "linear", "mlp", "norm")

T = TypeVar("T")


@dataclass(frozen=True)
class BaseModel:
    """The model that is trained and the directory of its files."""

    name: str
    path: Path


@dataclass(frozen=True)
class Data:
    """The data file, its digest, and what is done with it.

    `too_long` says what becomes of an example above max_seq_length; `merge`
    whether examples of one conversation are computed together.
    """

    path: Path
    sha256: str
    too_long: str = "truncate_history"
    merge: bool = True


@dataclass(frozen=True)
class Hyperparameters:
    """The settings of the optimisation; batch_size counts examples per optimizer step.

    After `early_stopping_patience` evaluations without a gain the training ends; 0 for never.
    """

    learning_rate: float
    batch_size: int
    epochs: int
    rank: int
    alpha: float
    dropout: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_seq_length: int = 2048
    seed: int = 42
    early_stopping_patience: int = 3


@dataclass(frozen=True)
class Dry:
    """The script that the dry backend plays."""

    steps: int = 20
    step_seconds: float = 0.05
    loss: tuple[float, float] = (3.2, 0.4)
    exit_at_step: int = 0
    exit_code: int = 0
    ignore_sigterm: bool = False
    nonfinite_at_step: int = 0


@dataclass(frozen=True)
class Plan:
    """One attempt at one job.

    Tokens may be kept in `cache_dir` for the next one. `merged` asks for the base
    model with the adapter added as well, in files of at most `merged_file_bytes`.
    """

    job: str
    attempt: int
    backend: str
    run_dir: Path
    base_model: BaseModel
    data: Data
    hyperparameters: Hyperparameters
    device: str = "cpu"
    devices: int = 1  # one rank each; CUDA_VISIBLE_DEVICES names them
    quantisation: str = "none"  # of the base model: none or nf4
    shard: bool = False  # spread the base model over the devices even if it fits one
    validation_fraction: float = 0.05
    checkpoint_every_steps: int = 0
    checkpoint_every_seconds: float = 60.0
    keep_checkpoints: int = 2
    resume_from: Path | None = None
    cache_dir: Path | None = None
    merged: bool = False
    merged_file_bytes: int = 4_900_000_000
    threads: int = 0
    sanity: bool = False
    slow_paths: tuple[str, ...] = ()
    dry: Dry = field(default_factory=Dry)

    @property
    def checkpoints(self) -> Path:
        """Where this attempt keeps its checkpoints."""
        return self.run_dir / "checkpoints"


def read(path: Path) -> dict[str, Any]:
    """The plan as written; Failure when it is missing or not a JSON object."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise Failure("input_missing", f"the plan {path} is not there") from None
    except OSError as e:
        raise Failure("plan_invalid", f"the plan {path} cannot be read: {e.strerror}") from None
    try:
        value = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise Failure("plan_invalid", f"the plan is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise Failure("plan_invalid", "the plan is not a JSON object")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def parse(raw: dict[str, Any]) -> Plan:
    """The checked plan; one Failure names every error at once."""
    r = _Reader(raw, "")
    v = r.integer("v", low=1)
    if v is not None and v != VERSION:
        r.errors.append(f"v is {v}, this trainer reads version {VERSION}")
    job = r.text("job")
    attempt = r.integer("attempt", low=1)
    backend = r.choice("backend", ("torch", "dry"))
    run_dir = r.path("run_dir")
    device = r.device("device", "cpu")
    m = r.section("base_model")
    model = (m.text("name"), m.path("path"))
    d = r.section("data")
    data = (
        d.path("path"),
        d.sha256("sha256"),
        d.choice("too_long", TOO_LONG, "truncate_history"),
        d.boolean("merge", True),
    )
    h = r.section("hyperparameters")
    hyper: dict[str, Any] = {
        "learning_rate": h.number("learning_rate", above=0, high=1),
        "batch_size": h.integer("batch_size", low=1, high=4096),
        "epochs": h.integer("epochs", low=1, high=1000),
        "rank": h.integer("rank", low=1, high=1024),
        "alpha": h.number("alpha", above=0, high=65536),
        "dropout": h.number("dropout", 0.0, low=0, below=1),
        "warmup_steps": h.integer("warmup_steps", 0, low=0),
        "weight_decay": h.number("weight_decay", 0.0, low=0, high=10),
        "max_seq_length": h.integer("max_seq_length", 2048, low=16, high=1 << 20),
        "seed": h.integer("seed", 42, low=-(1 << 63), high=(1 << 63) - 1),
        "early_stopping_patience": h.integer("early_stopping_patience", 3, low=0, high=1000),
    }
    rest: dict[str, Any] = {
        "validation_fraction": r.number("validation_fraction", 0.05, low=0, high=0.5),
        "checkpoint_every_steps": r.integer("checkpoint_every_steps", 0, low=0),
        "checkpoint_every_seconds": r.number("checkpoint_every_seconds", 60.0, low=0),
        "keep_checkpoints": r.integer("keep_checkpoints", 2, low=1, high=1000),
        "devices": r.integer("devices", 1, low=1, high=64),
        "quantisation": r.choice("quantisation", ("none", "nf4"), "none"),
        "shard": r.boolean("shard", False),
        "threads": r.integer("threads", 0, low=0, high=1024),
        "sanity": r.boolean("sanity", False),
        "merged": r.boolean("merged", False),
        "merged_file_bytes": r.integer("merged_file_bytes", 4_900_000_000, low=1000),
        "slow_paths": r.words("slow_paths", SLOW_PATHS),
    }
    resume, cache_dir = r.path("resume_from", empty=True), r.path("cache_dir", empty=True)
    y = r.section("dry", optional=True)
    dry: dict[str, Any] = {
        "steps": y.integer("steps", 20, low=1, high=10_000_000),
        "step_seconds": y.number("step_seconds", 0.05, low=0, high=3600),
        "loss": y.pair("loss", (3.2, 0.4)),
        "exit_at_step": y.integer("exit_at_step", 0, low=0),
        "exit_code": y.integer("exit_code", 0, low=0, high=255),
        "ignore_sigterm": y.boolean("ignore_sigterm", False),
        "nonfinite_at_step": y.integer("nonfinite_at_step", 0, low=0),
    }
    r.errors += [
        f"{key} and quantisation exclude each other"
        for key in ("shard", "merged")
        if rest["quantisation"] != "none" and rest[key]
    ]
    errors = [e for part in (r, m, d, h, y) for e in part.finish()]
    if errors:
        raise Failure("plan_invalid", "the plan has errors: " + "; ".join(errors))
    return Plan(
        job=_known(job),
        attempt=_known(attempt),
        backend=_known(backend),
        run_dir=_known(run_dir),
        device=_known(device),
        base_model=BaseModel(_known(model[0]), _known(model[1])),
        data=Data(_known(data[0]), _known(data[1]), _known(data[2]), _known(data[3])),
        hyperparameters=Hyperparameters(**hyper),
        resume_from=resume,
        cache_dir=cache_dir,
        dry=Dry(**dry),
        **rest,
    )


def plain(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values that `parse` reads."""
    value = {k: v for k, v in asdict(plan).items() if v is not None}
    return json.loads(json.dumps({"v": VERSION, **value}, default=str))


def _known(value: T | None) -> T:
    if value is None:
        raise AssertionError("a value without an error is missing")
    return value


class _Reader:
    """Takes keys out of one object and collects what is wrong with them."""

    def __init__(self, raw: object, name: str, optional: bool = False) -> None:
        self.prefix = f"{name}." if name else ""
        self.errors: list[str] = []
        self.absent = raw is None and optional
        self.missing = raw is None and not optional
        self.raw: dict[str, Any] = {}
        if isinstance(raw, dict):
            self.raw = dict(raw)
        elif raw is not None:
            self.errors.append(f"{name} must be an object")
            self.missing = True

    def section(self, key: str, optional: bool = False) -> _Reader:
        there = key in self.raw
        part = _Reader(self.raw.pop(key, None), key, optional)
        if not there and not optional:
            self.errors.append(f"{key} is missing")
        elif part.missing and not part.errors:
            part.errors.append(f"{key} must be an object")
        return part

    def finish(self) -> list[str]:
        unknown = [f"{self.prefix}{k} is not a key of the plan" for k in sorted(self.raw)]
        return self.errors + unknown

    def _take(self, key: str, default: T | None, read: Callable[[Any], T]) -> T | None:
        if key not in self.raw:
            if default is None and not self.missing:
                self.errors.append(f"{self.prefix}{key} is missing")
            return default
        try:
            return read(self.raw.pop(key))
        except ValueError as e:
            self.errors.append(f"{self.prefix}{key} {e}")
            return default

    def text(self, key: str) -> str | None:
        return self._take(key, None, _text)

    def path(self, key: str, empty: bool = False) -> Path | None:
        if empty and self.raw.get(key, "") == "":
            self.raw.pop(key, None)
            return None
        return self._take(key, None, _path)

    def sha256(self, key: str) -> str | None:
        return self._take(key, None, _sha256)

    def device(self, key: str, default: str) -> str | None:
        return self._take(key, default, _device)

    def choice(self, key: str, words: tuple[str, ...], default: str | None = None) -> str | None:
        def read(v: object) -> str:
            if v not in words:
                raise ValueError(f"must be one of {', '.join(words)}")
            return str(v)

        return self._take(key, default, read)

    def words(self, key: str, known: tuple[str, ...]) -> tuple[str, ...] | None:
        def read(v: object) -> tuple[str, ...]:
            if not isinstance(v, list) or any(w not in known for w in v):
                raise ValueError(f"must be a list of {', '.join(known)}")
            return tuple(v)

        return self._take(key, (), read)

    def boolean(self, key: str, default: bool) -> bool | None:
        def read(v: object) -> bool:
            if not isinstance(v, bool):
                raise ValueError("must be true or false")
            return v

        return self._take(key, default, read)

    def integer(
        self, key: str, default: int | None = None, *, low: int, high: int | None = None
    ) -> int | None:
        def read(v: object) -> int:
            if isinstance(v, float) and v.is_integer():
                v = int(v)
            if isinstance(v, bool) or not isinstance(v, int):
                raise ValueError("must be a whole number")
            if v < low or (high is not None and v > high):
                raise ValueError(f"must be {_range(low, high)}, not {v}")
            return v

        return self._take(key, default, read)

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        low: float | None = None,
        above: float | None = None,
        high: float | None = None,
        below: float | None = None,
    ) -> float | None:
        def read(v: object) -> float:
            if isinstance(v, bool) or not isinstance(v, int | float):
                raise ValueError("must be a number")
            n = float(v)
            wrong = not math.isfinite(n)
            wrong = wrong or (low is not None and n < low) or (high is not None and n > high)
            wrong = wrong or (above is not None and n <= above)
            wrong = wrong or (below is not None and n >= below)
            if wrong:
                at_least = f"above {above:g}" if above is not None else f"at least {low or 0:g}"
                at_most = f" and below {below:g}" if below is not None else ""
                at_most = f" and at most {high:g}" if high is not None else at_most
                raise ValueError(f"must be {at_least}{at_most}, not {v}")
            return n

        return self._take(key, default, read)

    def pair(self, key: str, default: tuple[float, float]) -> tuple[float, float] | None:
        def read(v: object) -> tuple[float, float]:
            if not (isinstance(v, list) and len(v) == 2):
                raise ValueError("must be two numbers")
            if any(isinstance(x, bool) or not isinstance(x, int | float) for x in v):
                raise ValueError("must be two numbers")
            return float(v[0]), float(v[1])

        return self._take(key, default, read)


def _range(low: int, high: int | None) -> str:
    return f"at least {low}" if high is None else f"between {low} and {high}"


def _text(v: object) -> str:
    if not isinstance(v, str) or not v.strip():
        raise ValueError("must be a text that is not empty")
    return v


def _path(v: object) -> Path:
    path = Path(_text(v))
    if not path.is_absolute():
        raise ValueError(f"must be an absolute path, not {v}")
    return path


def _sha256(v: object) -> str:
    text = _text(v)
    if len(text) != 64 or any(c not in "0123456789abcdef" for c in text):
        raise ValueError("must be 64 lower-case hexadecimal digits")
    return text


def _device(v: object) -> str:
    text = _text(v)
    name, _, index = text.partition(":")
    if name not in ("cpu", "cuda") or (index and not (name == "cuda" and index.isdigit())):
        raise ValueError(f"must be cpu, cuda or cuda:<number>, not {text}")
    return text
