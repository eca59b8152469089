"""The torch backend: read, tokenize, load, train, save, readable top to bottom.

A step is a pure function of (data digest, seed, step): its examples, its
learning rate and its random state follow from these alone. So the state to
save is the step, the adapter and the optimizer's moments, and a resumed run
continues bit for bit on the CPU.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lora_train import (
    advice,
    beside,
    checkpoint,
    choice,
    curve,
    data,
    export,
    health,
    memory,
    merge,
    model,
    optimizer,
    packing,
    prepare,
    probe,
    reload,
    report,
    sanity,
    saver,
    schedule,
    verdict,
)
from lora_train.failure import Failure, is_out_of_memory
from lora_train.history import FILE, History
from lora_train.ranks import Ranks
from lora_train.render import Renderer, Sequence
from lora_train.session import Session, library_versions
from lora_train.stop import Preempted
from lora_train.work import Work

CLIP = 1.0  # of the gradient's norm
# Tokens in a micro-batch where memory is not measured, on a CPU: a wish to leave
# is heard after each, and more tokens at once are no faster there.
BUDGET = 1024
MOST_SKIPPED = 3  # steps in a row that were not finite
FEW_SPIKES = 3  # in a row: fewer are no reason not to save
MOST_WARNINGS = 20  # of jumps of the loss
BEST = "best.safetensors"

T = TypeVar("T")


def run(session: Session, ranks: Ranks) -> None:
    """Train one adapter; raises Preempted or Failure."""
    trainer = _Trainer(session, ranks)
    ranks.load()
    try:
        trainer.read()
        with trainer.preparing:
            trainer.load()
        trainer.advise()
        with memory.few_collections():
            trainer.train()
        trainer.finish()
    except BaseException:
        # Nothing is said after the last words.
        with contextlib.suppress(BaseException):
            trainer.saver.wait()
        raise


@dataclass
class _State:
    """Where the training stands; all of it is in the checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss: float = math.nan
    validation_loss: float | None = None
    base_validation_loss: float | None = None
    # A run that ran out of memory once goes on as it could: so it stays exact after a resume.
    budget: int = 0
    recompute: bool = False
    trend: health.Trend = field(default_factory=health.Trend)
    spikes: int = 0
    rate_factor: float = 1.0
    rolled_back: bool = False
    evaluated_step: int = 0
    best: choice.Best = field(default_factory=choice.Best)


class _Trainer:
    def __init__(self, session: Session, ranks: Ranks) -> None:
        self.session, self.plan, self.ranks = session, session.plan, ranks
        self.emit, self.stop, self.clock = session.emit, session.stop, session.clock
        self.h = self.plan.hyperparameters
        self.state, self.history = _State(), History()
        self.epoch_plan: tuple[int, list[list[schedule.Piece]]] = -1, []
        self.saved_step, self.saved_at = -1, self.clock.monotonic()
        self.saver = saver.Saver()
        self.started = False
        self.ahead: tuple[int, list[Sequence]] = -1, []  # what the next step is made of
        self.good: Path | None = None  # the newest checkpoint of this run
        self.pace = health.Pace()
        self.best: dict[str, torch.Tensor] = {}  # the adapter with the lowest validation loss
        if self.plan.threads:
            torch.set_num_threads(self.plan.threads)
        torch.use_deterministic_algorithms(True, warn_only=True)

    # --- Reading ------------------------------------------------------------

    def read(self) -> None:
        """Read, check, render and split the data."""
        self.emit.stage("preparing")
        config = model.check_files(self.plan.base_model.path)
        examples = data.read(self.plan.data.path, self.plan.data.sha256, self.stop.check)
        self.tokenizer = model.tokenizer_of(self.plan.base_model.path)
        longest = min(self.h.max_seq_length, config.get("max_position_embeddings", 1 << 30))
        renderer = Renderer(self.tokenizer)
        # While the weights are loaded; its events are sent after that, in their order.
        self.preparing = beside.Beside(
            lambda check: prepare.prepare(self.plan, examples, renderer, longest, check),
            self.stop.check,
        )

    def _take(self, ready: prepare.Prepared) -> None:
        """Say what became of the examples, and plan the steps."""
        for n in ready.notices:
            self.emit.log(n.level, n.message, n.code)
        self.data, self.sizes = ready, [len(c.parts) for c in ready.train]
        self.train_set = [c.whole() for c in ready.train]
        self.held_set = [c.whole() for c in ready.held]
        self.examples, self.held_examples = (
            prepare.count(those) for those in (ready.train, ready.held)
        )
        self.per_epoch = schedule.steps_per_epoch(self.examples, self.h.batch_size)
        self.total = self.per_epoch * self.h.epochs
        # Other epochs cut other conversations: theirs differ by little.
        self.epoch_tokens = sum(
            len(s.tokens) for step in range(self.per_epoch) for s in self._examples(step + 1)
        )
        held_tokens = sum(len(s.tokens) for s in self.held_set)
        self.every = choice.evaluate_every(
            self.total, self.epoch_tokens * self.h.epochs, held_tokens
        )

    # --- Loading ------------------------------------------------------------

    def load(self) -> None:
        """Load the model, put the adapter on it, resume."""
        self.emit.stage("loading_model")
        self.stop.check()
        if self.plan.sanity:
            sanity.check(self.session)
        self.model = model.load(self.plan, on_host=self.ranks.sharded)
        self.ranks.connect(self.model)
        self._take(self.preparing.result(self.emit.alive))
        self.parameters = model.trainable(self.model)
        self.optimizer = optimizer.Optimizer(self.parameters, self.h.weight_decay)
        # Where the adapter began, until there is a checkpoint to go back to.
        self.beginning = {n: p.detach().cpu().clone() for n, p in self.parameters.items()}
        self._resume()
        self.forward = packing.Forward(self.model, self.plan.device)
        work = Work(self.forward, self.plan.device, self.stop.check, self.emit.alive)
        self.ranks.join(work, self.train_set)
        planned = self._plan_memory()
        self.emit.send(
            "plan",
            total_steps=self.total,
            epochs=self.h.epochs,
            start_step=self.state.step,
            examples=self.examples,
            validation_examples=self.held_examples,
            sequences=len(self.train_set),
            tokens_per_epoch=self.epoch_tokens,
            loss_tokens_per_epoch=sum(s.loss_tokens for s in self.train_set),
            trainable_parameters=sum(p.numel() for p in self.parameters.values()),
            data_sha256=self.plan.data.sha256,
            base_model=self.plan.base_model.name,
            memory_plan=planned,
        )

    def _plan_memory(self) -> dict[str, int | bool]:
        """Set the tokens of a micro-batch, and whether activations are recomputed."""
        st, base, device = self.state, self.forward.base, self.plan.device
        if st.recompute or (self.ranks.sharded and not st.budget):
            st.recompute = memory.recompute(base)
        moments = sum(8 * p.numel() for p in self.parameters.values())
        meter = probe.meter_of(device)
        planned, total = probe.Planned(st.budget or BUDGET, st.recompute, probe.Need(), True), 0
        if meter is not None:
            total = meter.total()
            lengths = sorted((len(s.tokens) for s in self.train_set), reverse=True)
            planned = probe.Probe(
                meter,
                lambda tokens: self._pass(tokens, lengths[0]),
                lambda: memory.release(device),
                lambda: memory.recompute(base),
                self.stop.check,
                self.optimizer.missing(),
            ).plan(lengths[0], sum(lengths[: self.h.batch_size]), st.recompute)
            self._say_planned(planned, total)
        # A resumed run keeps what it had if that fits here too: so it stays exact.
        if not st.budget or st.budget > planned.budget or st.recompute != planned.recompute:
            st.budget, st.recompute = planned.budget, planned.recompute
        if not self.optimizer.updates:
            self.optimizer.begin()
        return probe.describe(planned.need, self.model, moments, st.budget, st.recompute, total)

    def _pass(self, tokens: int, longest: int) -> None:
        """One forward and backward pass that changes nothing."""
        devices = [torch.cuda.current_device()] if self.plan.device == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.model.train()
            try:
                some = probe.documents(self.train_set, tokens, longest)
                self.ranks.trial(some, self.state.recompute)
                self.emit.alive()
            finally:
                self.optimizer.zero_grad()

    def _say_planned(self, planned: probe.Planned, total: int) -> None:
        """Tell the user when memory is tight."""
        need = planned.need.of(planned.budget) / memory.GIB
        if not planned.fits:
            said = f"{planned.budget:,} tokens, the longest example, may not fit: they need"
            said = f"{said} {need:.1f} GiB of the {total / memory.GIB:.0f} of the device"
            self.emit.log("warn", said, "memory_tight")
        elif planned.recompute and not self.state.recompute:
            self.emit.log(
                "info", "activations are recomputed: they do not fit otherwise", "memory_recompute"
            )

    def advise(self) -> None:
        """Say what is odd about the plan; it is carried out all the same."""
        base = self.forward.base
        facts = advice.Facts(
            model_type=base.config.model_type,
            parameters=sum(p.numel() for p in base.parameters() if not p.requires_grad),
            learning_rate=self.h.learning_rate,
            batch_size=self.h.batch_size,
            dropout=self.h.dropout,
            steps=self.total,
            examples=self.examples,
            cuda=self.plan.device == "cuda",
        )
        for code, said in advice.advise(facts):
            self.emit.log("warn", said, code)

    def _resume(self) -> None:
        if self.plan.resume_from is None:
            return
        found = checkpoint.newest(self.plan.resume_from, self.plan.checkpoints, self._damaged)
        if found is None:
            self.emit.log("warn", "no checkpoint verifies: starting again", "resume_lost")
            return
        if found.manifest.get("fingerprint") != self._fingerprint():
            self.emit.log(
                "warn", "the checkpoint is of another plan: starting again", "resume_lost"
            )
            return
        self._restore(found)

    def _restore(self, found: checkpoint.Saved) -> None:
        """Go on from a checkpoint that verified."""
        adapter = load_tensors((found.path / "adapter.safetensors").read_bytes())
        moments = load_tensors((found.path / "optimizer.safetensors").read_bytes())
        saved = json.loads((found.path / "state.json").read_text())
        updates = saved.pop("updates")
        known = {f.name for f in fields(_State)}
        saved["trend"] = health.Trend(**saved.get("trend", {}))
        saved["best"] = choice.Best(**saved.get("best", {}))
        self.state = _State(**{k: v for k, v in saved.items() if k in known})
        metrics = found.path / FILE
        self.history = History(metrics.read_text() if metrics.is_file() else "")
        kept = found.path / BEST
        self.best = load_tensors(kept.read_bytes()) if kept.is_file() else {}
        if self.state.best.step == self.state.step:
            self.best = adapter
        self.optimizer.restore(moments, updates)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(adapter[name])
        self.good, self.saved_step = found.path, self.state.step
        self.emit.step_now = self.emit.last_checkpoint_step = self.state.step

    def _damaged(self, why: str) -> None:
        self.emit.log("warn", f"checkpoint not used: {why}", "checkpoint_damaged")

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to fit."""
        return {
            "backend": "torch",
            "data": self.plan.data.sha256,
            "base_model": self.plan.base_model.name,
            # Left out where it was left out before there was a choice.
            **({} if self.plan.quantisation == "none" else {"base": self.plan.quantisation}),
            "validation_fraction": self.plan.validation_fraction,
            "too_long": self.plan.data.too_long,
            "merge": self.plan.data.merge,
            **asdict(self.h),
        }

    # --- Training -----------------------------------------------------------

    def train(self) -> None:
        """The steps; a wish to leave costs at most the one in progress."""
        try:
            if self.state.step == 0 and self.held_set:
                self.state.base_validation_loss = self._validation_loss()
            self.emit.stage("training")
            self._evaluate_if_due()
            while self.state.step < self.total:
                step = self.state.step + 1
                self.saver.check()
                self._step(step)
                self._say_start()
                memory.collect(step)
                if trouble := self._trouble():
                    self._roll_back(trouble)
                    continue
                self._evaluate_if_due()
                if self._due():
                    self._save()
        except Preempted:
            self.emit.expect(health.FIRST_SECONDS)
            self.saver.wait()
            if self.state.step > max(0, self.saved_step) and self._healthy():
                self._save()
            raise

    def _say_start(self) -> None:
        """Say once how long somebody waited for the first step."""
        if not self.started:
            self.started = True
            seconds = self.clock.monotonic() - self.session.began
            self.emit.log(
                "info", f"the first step was done {seconds:.1f} s after the start", "start"
            )

    def _healthy(self) -> bool:
        """Whether one may come back to this state: only such states are saved."""
        st = self.state
        return st.skipped_in_a_row == 0 and st.trend.spikes_in_a_row < FEW_SPIKES

    def _trouble(self) -> str:
        """Why the training cannot go on like this, empty when it can."""
        if self.state.skipped_in_a_row >= MOST_SKIPPED:
            return f"{MOST_SKIPPED} steps in a row were not finite"
        if self.state.trend.spikes_in_a_row >= health.MOST_SPIKES:
            return f"the loss stayed far above its trend for {health.MOST_SPIKES} steps"
        return ""

    def _roll_back(self, why: str) -> None:
        """Back to the last good state with half the learning rate; once.

        Nothing is saved here: a run that is interrupted before its next
        checkpoint comes to this same place again.
        """
        was = self.state
        if was.rolled_back:
            raise Failure("diverged", f"{why}, also with half the learning rate")
        self.saver.wait()
        own = self.plan.checkpoints
        found = self.good and checkpoint.newest(self.good, own, self._damaged)
        if found:
            self._restore(found)
        elif self.beginning:
            self.state = _State(base_validation_loss=was.base_validation_loss)
            self.history = History()
            self.best = {}
            self.optimizer.begin()
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(self.beginning[name])
            self.emit.step_now = 0
        else:
            raise Failure("diverged", f"{why}, and no checkpoint is left to go back to")
        st = self.state
        st.rolled_back, st.rate_factor = True, st.rate_factor / 2
        st.skipped, st.spikes = was.skipped, was.spikes
        st.budget, st.recompute = was.budget, was.recompute
        said = f"{why}: back to step {st.step} with half the learning rate"
        self.emit.log("warn", said, "rolled_back")

    def _examples(self, step: int) -> list[Sequence]:
        """What is computed in a step: conversations, cut to the examples that it needs."""
        epoch, place = divmod(step - 1, self.per_epoch)
        if self.epoch_plan[0] != epoch:
            count = len(self.data.train)
            order = schedule.order(self.plan.data.sha256, self.h.seed, epoch, count)
            self.epoch_plan = epoch, schedule.steps(order, self.sizes, self.h.batch_size)
        return [self.data.train[c].cut(a, b) for c, a, b in self.epoch_plan[1][place]]

    def _step(self, step: int) -> None:
        """One optimizer step over exactly batch_size examples."""
        began = self.clock.monotonic()
        batch = self.ahead[1] if self.ahead[0] == step else self._examples(step)
        tokens = sum(len(s.tokens) for s in batch)
        loss_tokens = sum(s.loss_tokens for s in batch)
        peak = self.h.learning_rate * self.state.rate_factor
        rate = schedule.learning_rate(peak, step, self.total, self.h.warmup_steps)
        self.emit.expect(self.pace.allowed(tokens))
        loss, norm = self._fitting(batch, lambda: self._update(step, batch, loss_tokens, rate))
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.optimizer.settle(finite)
        seconds = self.clock.monotonic() - began
        self._account(step, loss, finite, tokens, seconds)
        self._tell(
            "sample",
            step=step,
            epoch=self._epoch(),
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=tokens,
            loss_tokens=loss_tokens,
            tokens_per_second=round(tokens / max(seconds, 1e-9), 3),
            seconds=round(seconds, 6),
            skipped=not finite,
        )
        if not finite:
            self.emit.log("warn", f"step {step} is not finite and is skipped", "nonfinite_skipped")

    def _update(
        self, step: int, batch: list[Sequence], loss_tokens: int, rate: float
    ) -> tuple[float, float]:
        """Do the work of a step; its loss and the norm of its gradients.

        A step that is not finite changes nothing: the device sees to that.
        """
        total, norm = self._gradients(step, batch, loss_tokens)
        both = torch.stack([total, norm.double()])
        self.optimizer.step(rate, 1 - both.isfinite().all().float())
        # The device is still busy: time to make the next step's rows.
        if step < self.total:
            self.ahead = step + 1, self._examples(step + 1)
            self.forward.prepare(self.ranks.mine(self.ahead[1], self.state.budget))
        # The only place in a step where the host waits for the device.
        loss, length = both.tolist()
        return loss, length

    def _gradients(
        self, step: int, batch: list[Sequence], loss_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill the gradients of a step, clipped; its loss and their norm, on the device."""
        st = self.state
        total = self.ranks.gradients(batch, loss_tokens, step, st.budget, st.recompute)
        return total, torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)

    def _fitting(self, batch: list[Sequence], work: Callable[[], T]) -> T:
        """Do the work again in smaller pieces for as long as memory runs out."""
        while True:
            try:
                return work()
            except Exception as e:
                if not is_out_of_memory(e):
                    raise
            # Only outside of the block does nothing hold the tensors of the failed try.
            self.optimizer.zero_grad()
            memory.release(self.plan.device)
            self._lower([len(s.tokens) for s in batch])

    def _lower(self, lengths: list[int]) -> None:
        """The next rung of the ladder."""
        st, groups = self.state, self.ranks.groups
        said = f"out of memory at {memory.largest(groups, lengths, st.budget):,} tokens"
        if smaller := memory.smaller_budget(groups, lengths, st.budget):
            st.budget = smaller
            self.emit.log("warn", f"{said}: at most {smaller:,} in a micro-batch now", "oom_budget")
        elif not st.recompute and memory.recompute(self.forward.base):
            st.recompute = True
            self.emit.log("warn", f"{said}: activations are recomputed now", "oom_recompute")
        else:
            tokens, base = max(lengths), self.forward.base
            config = base.config.get_text_config()
            needed = memory.estimate(self.model, config, tokens, st.recompute)
            raise memory.too_large(self.plan.device, tokens, needed, 1)

    def _account(self, step: int, loss: float, finite: bool, tokens: int, seconds: float) -> None:
        st = self.state
        st.step, st.tokens, st.seconds = step, st.tokens + tokens, st.seconds + seconds
        st.skipped += not finite
        st.skipped_in_a_row = 0 if finite else st.skipped_in_a_row + 1
        if finite:
            st.loss = loss
            self._watch(step, loss)
        self.pace.took(tokens, seconds)
        self.emit.step_now = step
        self.emit.alive()

    def _watch(self, step: int, loss: float) -> None:
        """Warn of a loss that jumps."""
        st, mean = self.state, self.state.trend.mean
        if away := st.trend.add(loss):
            st.spikes += 1
            if st.spikes <= MOST_WARNINGS:
                said = f"the loss of step {step} is {loss:.3f}, {away:.0f} deviations above"
                self.emit.log("warn", f"{said} its mean of {mean:.3f}", "loss_spike")

    def _tell(self, ev: str, **said: Any) -> None:  # noqa: ANN401
        """Send a measurement and keep it for metrics.jsonl."""
        self.history.add(ev, said)
        self.emit.send(ev, **said)

    def _epoch(self) -> float:
        return round(self.state.step / self.per_epoch, 6)

    def _validation_loss(self) -> float:
        self.emit.stage("validating")
        return self._fitting(self.held_set, self._held_loss)

    def _held_loss(self) -> float:
        return self._mean_loss(self.held_set)

    def _mean_loss(self, those: list[Sequence]) -> float:
        """Mean loss of a trained token without training on it."""
        st = self.state
        self.emit.expect(self.pace.allowed(sum(len(s.tokens) for s in those)))
        total = self.ranks.held(those, st.budget, st.recompute)
        return total / sum(s.loss_tokens for s in those)

    def _evaluate_if_due(self) -> None:
        """Evaluate at the ends of epochs and between; after a resume what was missed."""
        step, st = self.state.step, self.state
        between = self.every and step % self.every == 0
        if self.held_set and step > st.evaluated_step and (between or step % self.per_epoch == 0):
            self._evaluate()
        patience = self.h.early_stopping_patience
        if st.best.enough(patience) and step < self.total and st.evaluated_step == step:
            said = f"no gain in {patience} evaluations: the training ends after step {step}"
            self.emit.log("info", said, "early_stop")
            self.total = step

    def _evaluate(self) -> None:
        loss = self._validation_loss()
        self.state.validation_loss, self.state.evaluated_step = loss, self.state.step
        if self.state.best.add(loss, self.state.step):
            self.best = {n: p.detach().cpu().clone() for n, p in self.parameters.items()}
        self._tell(
            "eval",
            step=self.state.step,
            epoch=self._epoch(),
            validation_loss=loss,
            perplexity=_perplexity(loss),
            tokens=sum(len(s.tokens) for s in self.held_set),
            loss=self.state.loss,
            learning_rate=self.optimizer.rate,
        )
        if self.state.step < self.total:
            self.emit.stage("training")

    # --- Saving -------------------------------------------------------------

    def _due(self) -> bool:
        step = self.state.step
        if step == self.total:
            return True
        if not self._healthy():
            return False
        if self.stop.take_checkpoint_wish():
            return True
        every = self.plan.checkpoint_every_steps
        if every and step % every == 0:
            return True
        seconds = self.plan.checkpoint_every_seconds
        return seconds > 0 and self.clock.monotonic() - self.saved_at >= seconds

    def _save(self) -> None:
        """Save the last whole step: copy it, and let it be written while training goes on."""
        began, step = self.clock.monotonic(), self.state.step
        last = step == self.total or self.stop.asked > 0
        if last:
            self.emit.stage("saving")
        self.emit.expect(health.FIRST_SECONDS)
        moments = self.optimizer.moments()
        host = self.saver.copies({**self.parameters, **moments})
        adapter = {n: host[n] for n in self.parameters}
        best = self.best if self.best and self.state.best.step != step else {}
        state = json.dumps({**asdict(self.state), "updates": self.optimizer.updates}).encode()
        metrics, final = self.history.bytes(), step == self.total
        epoch, loss = self._epoch(), self.state.loss

        def write() -> checkpoint.Saved:
            files = {
                "adapter.safetensors": save_tensors(adapter),
                "optimizer.safetensors": save_tensors({n: host[n] for n in moments}),
                "state.json": state,
                FILE: metrics,
            }
            if best:
                files[BEST] = save_tensors(best)
            saved = checkpoint.write(
                self.plan.checkpoints / checkpoint.directory_name(step),
                step,
                files,
                {"fingerprint": self._fingerprint()},
                self.stop.check_twice,
            )
            checkpoint.prune(self.plan.checkpoints, self.plan.keep_checkpoints, step)
            return saved

        def written(saved: checkpoint.Saved) -> None:
            self.good, self.saved_step = saved.path, step
            self.beginning.clear()
            self.emit.last_checkpoint_step = step
            self.emit.send(
                "checkpoint",
                step=step,
                epoch=epoch,
                loss=loss,
                path=saved.path,
                manifest_sha256=saved.manifest_sha256,
                bytes=saved.bytes,
                files=[f.plain() for f in saved.files],
                final=final,
                stall_ms=stall,
            )

        stall = round(1000 * (self.clock.monotonic() - began), 3)
        self.saver.start(write, written)
        self.saved_at = self.clock.monotonic()
        if last:
            self.saver.wait()

    def finish(self) -> None:
        """Write the adapter and say that all is done."""
        self.emit.stage("saving")
        st = self.state
        adapter_step = st.step
        if self.best and st.best.step != st.step:
            adapter_step = st.best.step
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(self.best[name])
            said = f"the adapter of step {st.best.step} is kept, not the last: its validation loss"
            self.emit.log("info", f"{said} is {st.best.loss:.4f}", "best_kept")
            st.validation_loss = st.best.loss
        overfit = verdict.overfit(
            self.history.points("eval", "validation_loss"),
            self.history.points("sample", "loss"),
            st.base_validation_loss,
        )
        outcome = {
            "steps": st.step,
            "adapter_step": adapter_step,
            "epochs": self._epoch(),
            "examples": self.examples,
            "validation_examples": self.held_examples,
            "tokens": st.tokens,
            "seconds": round(st.seconds, 3),
            "skipped_steps": st.skipped,
            "training_loss": st.loss if math.isfinite(st.loss) else None,
            "validation_loss": st.validation_loss,
            "base_validation_loss": st.base_validation_loss,
            "overfit": overfit,
            "hyperparameters": asdict(self.h),
        }
        beside = self._beside(outcome)
        saved = export.write(self.plan, self.model, self.tokenizer, outcome, beside)
        files = [*saved.files, *self._prove(saved.path)]
        self.emit.send(
            "result",
            path=saved.path,
            files=[f.plain() for f in files],
            steps=st.step,
            epochs=self._epoch(),
            training_loss=st.loss,
            validation_loss=st.validation_loss,
            perplexity=None if st.validation_loss is None else _perplexity(st.validation_loss),
            base_validation_loss=st.base_validation_loss,
            overfit=overfit,
            tokens=st.tokens,
            seconds=round(st.seconds, 6),
        )
        self.emit.stage("done")

    def _prove(self, adapter: Path) -> list[checkpoint.File]:
        """Have a fresh process read the adapter and find the same loss.

        The files of the merged model, if one is wanted: it has to have that loss as well.
        """
        those = self.held_set or self.train_set
        batch = [those[i] for i in reload.batch_of([len(s.tokens) for s in those])]
        spread = self.ranks.sharded
        batch = batch[:1] if spread else batch  # a host is slow
        expected = self._fitting(batch, lambda: self._mean_loss(batch))
        self.ranks.close()
        if self.plan.device == "cuda" and not spread:  # the other process needs the room
            self.optimizer.close()
            self.model.to("meta")
            torch.cuda.empty_cache()

        def alive() -> None:
            self.stop.check()
            self.emit.alive()

        parts = [reload.Part(s.tokens, s.trained) for s in batch]
        loss = reload.prove(self.plan, adapter, parts, expected, alive, on_host=spread)
        self.emit.log(
            "info",
            f"read again from disk, the adapter has a loss of {loss:.4f} on "
            f"{len(batch)} examples, as it had in training",
            "reloaded",
        )
        if not self.plan.merged:
            return []
        files = merge.write(self.plan, adapter, parts, loss, alive)
        size = sum(f.bytes for f in files)
        self.emit.log("info", f"the merged model has {len(files)} files, {size:,} bytes", "merged")
        return files

    def _beside(self, outcome: dict[str, Any]) -> dict[str, bytes]:
        """What is told about the training beside its weights."""
        held, base = self.history.points("eval", "validation_loss"), self.state.base_validation_loss
        if base is not None and math.isfinite(base):
            held = [(0, base), *held]
        svg, png = curve.draw(self.history.points("sample", "loss"), held)
        of_data = report.data_report(self.plan, self.data, self.epoch_tokens)
        fixed = {"optimizer": "adamw", "schedule": "cosine to a tenth", "clip_norm": CLIP}
        settings = report.training_args(self.plan, library_versions(), fixed)
        return {
            "README.md": report.card(self.plan, outcome, self.data).encode(),
            "training_args.json": export.as_json(settings),
            "data_report.json": export.as_json(of_data),
            "samples.txt": report.samples(self.data.samples),
            FILE: self.history.bytes(),
            "loss.svg": svg,
            "loss.png": png,
        }


def _perplexity(loss: float) -> float:
    """e to the loss; infinite when that does not fit a double."""
    return math.exp(loss) if loss < 700 else math.inf
