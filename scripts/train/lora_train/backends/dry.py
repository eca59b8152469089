"""A trainer that trains nothing: it plays the plan's `dry` script.

It needs only the standard library and speaks the whole protocol: believable
samples, checkpoints whose manifests verify, exact resume, and every way to
fail that an agent must be able to survive.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from dataclasses import dataclass
from typing import Any

from lora_train import checkpoint, failure
from lora_train.failure import Failure
from lora_train.schedule import learning_rate
from lora_train.session import Session
from lora_train.stop import Preempted

TOKENS_PER_EXAMPLE = 512
ADAPTER_BYTES = 4096


@dataclass
class _State:
    """Where the pretended training stands."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0


def run(session: Session) -> None:
    """Play the script from the start or from a checkpoint."""
    player = _Player(session)
    player.prepare()
    player.train()
    player.finish()


class _Player:
    def __init__(self, session: Session) -> None:
        self.session, self.plan = session, session.plan
        self.emit, self.clock = session.emit, session.clock
        self.script, self.h = self.plan.dry, self.plan.hyperparameters
        self.state = _State()
        self.saved_step = 0
        self.saved_at = self.clock.monotonic()

    def prepare(self) -> None:
        """Everything before the first step."""
        self.emit.stage("preparing")
        self.session.stop.check()
        self.emit.stage("loading_model")
        if self.plan.sanity:  # there is no device to look at
            none: dict[str, Any] = {"flops": 0.0, "copy_bytes_per_second": 0.0, "seconds": 0.0}
            self.emit.send("sanity", index=0, device=self.plan.device, wrong="", check="", **none)
        self._resume()
        steps = self.script.steps
        examples = max(1, steps * self.h.batch_size // self.h.epochs)
        self.emit.send(
            "plan",
            total_steps=steps,
            epochs=self.h.epochs,
            start_step=self.state.step,
            examples=examples,
            validation_examples=4 if self.plan.validation_fraction else 0,
            sequences=examples,
            tokens_per_epoch=examples * TOKENS_PER_EXAMPLE,
            loss_tokens_per_epoch=examples * TOKENS_PER_EXAMPLE // 2,
            trainable_parameters=ADAPTER_BYTES // 4,
            data_sha256=self.plan.data.sha256,
            base_model=self.plan.base_model.name,
            memory_plan={
                "weights": 0,
                "adapter": 2 * ADAPTER_BYTES,
                "optimizer": 2 * ADAPTER_BYTES,
                "bytes_per_token": 0,
                "budget_tokens": self.h.batch_size * TOKENS_PER_EXAMPLE,
                "recompute": False,
                "device_total": 0,
            },
        )

    def _resume(self) -> None:
        if self.plan.resume_from is None:
            return
        if not self.plan.resume_from.is_dir():
            raise Failure("input_missing", f"checkpoint {self.plan.resume_from} is not there")
        found = checkpoint.newest(self.plan.resume_from, self.plan.checkpoints, self._damaged)
        if found is None:
            self.emit.log("warn", "no checkpoint verifies: starting again", "resume_lost")
            return
        self.state = _State(**json.loads((found.path / "state.json").read_bytes()))
        self.saved_step = self.emit.last_checkpoint_step = self.emit.step_now = self.state.step
        self.emit.log("info", f"resumed from step {self.state.step}", "resumed")

    def _damaged(self, why: str) -> None:
        self.emit.log("warn", f"checkpoint not used: {why}", "checkpoint_damaged")

    def train(self) -> None:
        """The steps; a wish to leave costs at most the one in progress."""
        self.emit.stage("training")
        try:
            for step in range(self.state.step + 1, self.script.steps + 1):
                self._step(step)
        except Preempted:
            if self.state.step > self.saved_step:
                self.emit.stage("saving")
                self.save(final=True)
            raise

    def _step(self, step: int) -> None:
        began = self.clock.monotonic()
        self.session.wait(self.script.step_seconds)
        self.session.stop.check()
        if step == self.script.exit_at_step:
            self._leave()
        seconds = self.clock.monotonic() - began
        tokens = self.h.batch_size * TOKENS_PER_EXAMPLE
        bad = step == self.script.nonfinite_at_step
        loss = math.nan if bad else self.loss(step)
        rate = learning_rate(self.h.learning_rate, step, self.script.steps, self.h.warmup_steps)
        self.state.step, self.state.tokens = step, self.state.tokens + tokens
        self.state.seconds += seconds
        self.state.skipped += bad
        self.emit.step_now = step
        self.emit.alive()
        self.emit.send(
            "sample",
            step=step,
            epoch=self.epoch(step),
            loss=loss,
            learning_rate=rate,
            grad_norm=math.nan if bad else round(0.5 + self.loss(step) / 4, 6),
            tokens=tokens,
            loss_tokens=tokens // 2,
            tokens_per_second=round(tokens / seconds, 3) if seconds > 0 else 0.0,
            seconds=round(seconds, 6),
            skipped=bad,
        )
        if self.plan.validation_fraction and self._ends_epoch(step):
            self._evaluate(step, rate)
        if self._due(step):
            self.save(final=step == self.script.steps)

    def loss(self, step: int) -> float:
        """From the first to the last loss of the script, with a little noise of its own."""
        first, last = self.script.loss
        way = (step - 1) / max(1, self.script.steps - 1)
        fall = (math.exp(-3 * way) - math.exp(-3)) / (1 - math.exp(-3))
        digest = hashlib.sha256(f"{self.h.seed}:{step}".encode()).digest()
        noise = (digest[0] / 255 - 0.5) * 0.06 * (first - last) * way * (1 - way) * 4
        return round(last + (first - last) * fall + noise, 6)

    def epoch(self, step: int) -> float:
        """Epochs done after a step."""
        return round(step * self.h.epochs / self.script.steps, 6)

    def _ends_epoch(self, step: int) -> bool:
        epochs, steps = self.h.epochs, self.script.steps
        return step * epochs // steps > (step - 1) * epochs // steps

    def _evaluate(self, step: int, rate: float) -> None:
        self.emit.stage("validating")
        loss = round(self.loss(step) * 1.05, 6)
        self.emit.send(
            "eval",
            step=step,
            epoch=self.epoch(step),
            validation_loss=loss,
            perplexity=round(math.exp(min(loss, 700)), 6),
            tokens=4 * TOKENS_PER_EXAMPLE,
            loss=self.loss(step),
            learning_rate=rate,
        )
        if step < self.script.steps:
            self.emit.stage("training")

    def _due(self, step: int) -> bool:
        if step == self.script.steps or self.session.stop.take_checkpoint_wish():
            return True
        every = self.plan.checkpoint_every_steps
        if every and step % every == 0:
            return True
        seconds = self.plan.checkpoint_every_seconds
        return seconds > 0 and self.clock.monotonic() - self.saved_at >= seconds

    def save(self, *, final: bool) -> None:
        """Write and announce a checkpoint of the last whole step."""
        step = self.state.step
        state = {
            "step": step,
            "tokens": self.state.tokens,
            "seconds": round(self.state.seconds, 6),
            "skipped": self.state.skipped,
        }
        saved = checkpoint.write(
            self.plan.checkpoints / checkpoint.directory_name(step),
            step,
            {
                "adapter.safetensors": self._tensors(step),
                "optimizer.safetensors": self._tensors(-step),
                "state.json": json.dumps(state).encode(),
            },
            {"backend": "dry"},
            self.session.stop.check_twice,
        )
        checkpoint.prune(self.plan.checkpoints, self.plan.keep_checkpoints, step)
        self.saved_step, self.saved_at = step, self.clock.monotonic()
        self.emit.last_checkpoint_step = step
        self.emit.send(
            "checkpoint",
            step=step,
            epoch=self.epoch(step),
            loss=self.loss(step),
            path=saved.path,
            manifest_sha256=saved.manifest_sha256,
            bytes=saved.bytes,
            files=[f.plain() for f in saved.files],
            final=final,
            stall_ms=0.0,
        )

    def _tensors(self, step: int) -> bytes:
        """A valid safetensors file whose content follows from seed and step alone."""
        shape = [ADAPTER_BYTES // 4]
        header = {"weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, ADAPTER_BYTES]}}
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        seed = hashlib.sha256(f"{self.h.seed}:{step}".encode()).digest()
        # Small exponents only: every four bytes are a finite number.
        body = bytes(b & 0x3F for b in seed) * (ADAPTER_BYTES // len(seed))
        return len(head).to_bytes(8, "little") + head + body

    def finish(self) -> None:
        """Write the adapter and say that all is done."""
        self.emit.stage("saving")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.plan.base_model.name,
            "r": self.h.rank,
            "lora_alpha": self.h.alpha,
            "target_modules": ["weight"],
        }
        report = {"backend": "dry", "steps": self.state.step, "skipped": self.state.skipped}
        note = f"# {self.plan.base_model.name}\nNot a model: written by the dry backend.\n"
        saved = checkpoint.write(
            self.plan.run_dir / "adapter",
            self.state.step,
            {
                "adapter_model.safetensors": self._tensors(self.state.step),
                "adapter_config.json": _json(config),
                "README.md": note.encode(),
                "training_report.json": _json(report),
            },
            {"backend": "dry"},
        )
        validation = bool(self.plan.validation_fraction)
        loss = self.loss(self.state.step)
        last = round(loss * 1.05, 6)
        self.emit.send(
            "result",
            path=saved.path,
            files=[f.plain() for f in saved.files],
            steps=self.state.step,
            epochs=float(self.h.epochs),
            training_loss=loss,
            validation_loss=last if validation else None,
            perplexity=round(math.exp(min(last, 700)), 6) if validation else None,
            base_validation_loss=round(self.script.loss[0] * 1.05, 6) if validation else None,
            overfit="no" if validation else "unknown",
            tokens=self.state.tokens,
            seconds=round(self.state.seconds, 6),
        )
        self.emit.stage("done")

    def _leave(self) -> None:
        """End as the script wants: a kind of the protocol, a signal, or a bare number."""
        code = self.script.exit_code
        kind = failure.KINDS.get(code)
        if kind == "preempted":
            raise Preempted("the dry script")
        if kind is not None:
            raise Failure(kind, f"the dry script ends with {kind} at this step")
        self.emit.close()
        if 128 < code < 128 + signal.NSIG:
            signal.signal(code - 128, signal.SIG_DFL) if code - 128 not in (9, 19) else None
            os.kill(os.getpid(), code - 128)
        os._exit(code)


def _json(value: Any) -> bytes:  # noqa: ANN401
    return (json.dumps(value, indent=2) + "\n").encode()
