"""Several devices for one job: rank 0 is the trainer itself, the others work for it.

```
 agent ─ events, commands ─► rank 0  reads the data, decides, optimises, saves
                               │ order: parameters, examples, seed     ▲ loss, or what went wrong
                               ▼                                       │
                            rank 1 … n-1   loss and gradients of their share
```

Only rank 0 decides anything: whether to stop, what to do about memory, whether
a step counts. So the ranks need not agree on it, and the others hold no state
that could differ: parameters come with every order, and gradients go to rank 0
in one sum. No rank enters a collective before all have said that they finished
their part, so that a rank that dies or runs out of memory is news on its
channel and not a collective that never ends.

The examples of a step do not depend on the number of ranks; they are split by
tokens, and only the order of summation is another.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lora_train import channel, health, plan, render, schedule, session
from lora_train.channel import Channel
from lora_train.failure import Failure, is_out_of_memory

if TYPE_CHECKING:
    import torch

    from lora_train.work import Part, Work

T = TypeVar("T")

PACKAGE = Path(__file__).parent
PROOF = 3  # examples
LOOK_SECONDS = 0.1  # between two looks at the wish to stop
LAST_WORDS_SECONDS = 5.0  # for what a rank says before it goes
STUCK_SECONDS = 15.0  # that the main thread may need to notice a dead rank
COLLECTIVE_SECONDS = 300.0  # all have done their part: no collective takes that long


def run(of: session.Session) -> None:
    """The torch backend. The other ranks are started before torch is imported here."""
    with Ranks(of) as ranks:
        from lora_train import loop

        loop.run(of, ranks)


def shares(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Positions in `count` parts of like size in tokens; parts may be empty."""
    heap = [(0, n) for n in range(count)]
    out: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, n = heap[0]
        out[n].append(i)
        heapq.heapreplace(heap, (load + lengths[i], n))
    return [sorted(part) for part in out]


def connect(device: str, rank: int, size: int, store: str) -> None:
    """Join the other ranks; they find each other through a file of the run directory."""
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        # Longer than anybody waits: our own watch speaks first, and says more.
        timeout=timedelta(seconds=2 * health.FIRST_SECONDS),
    )


def disconnect() -> None:
    """Leave the group. With NCCL that may wait for ranks that are gone: there it is left."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def spawn(end: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start one rank with its end of a channel. Only the main thread may: it ends with that."""
    # A signal to the group is for rank 0 alone. A blocked signal stays so in a child.
    asked = {signal.SIGTERM, signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, asked)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "lora_train.rank", str(end), str(os.getpid())],
            cwd=PACKAGE.parent,
            env=env,
            stdin=subprocess.DEVNULL,
            pass_fds=[end],
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class _Other:
    """A rank beside this one."""

    rank: int
    process: subprocess.Popen[bytes]
    channel: Channel


class Ranks:
    """All ranks of a job as rank 0 sees them. A plan of one device has no others."""

    def __init__(self, of: session.Session) -> None:
        self._session, self._plan = of, of.plan
        self._emit, self._stop = of.emit, of.stop
        self.size = of.plan.devices
        self.sharded = False  # every rank has only a part of the weights
        self._others: list[_Other] = []
        self._store = of.plan.run_dir / "ranks.store"
        self._order = 0
        self._done = threading.Event()
        self._work: Work | None = None

    def __enter__(self) -> Ranks:
        """Start the others; they load the model while we read the data."""
        if self.size > 1:
            self._store.unlink(missing_ok=True)
            try:
                self._start()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        visible = _visible(self._plan.device, self.size)
        # Only the loopback device: nobody on the network takes part in this job.
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        for rank in range(1, self.size):
            ours, theirs = socket.socketpair()
            env = dict(os.environ)
            if visible:
                env["CUDA_VISIBLE_DEVICES"] = visible[rank]
            child = spawn(theirs.fileno(), env)
            theirs.close()
            self._others.append(_Other(rank, child, Channel(ours)))
        watch = threading.Thread(target=self._watch, name="ranks", daemon=True)
        watch.start()
        start = {"plan": plan.plain(self._plan), "size": self.size, "store": str(self._store)}
        for other in self._others:
            self._send(other, {**start, "rank": other.rank})

    def load(self) -> None:
        """Have the others load the model; what torch knows of the device says how."""
        from lora_train import shard

        self.sharded = shard.wanted(self._plan)
        self._tell({"do": "load", "sharded": self.sharded})

    def connect(self, model: torch.nn.Module) -> None:
        """Join the others once all have loaded the model; spread it if it is to be."""
        if not self._others:
            return
        self._collect()
        self._tell({"do": "connect"})
        connect(self._plan.device, 0, self.size, str(self._store))
        if self.sharded:
            from lora_train import shard

            self._careful(lambda: shard.spread(model, self._plan.device))

    def join(self, work: Work, examples: Sequence[render.Sequence]) -> None:
        """Have every rank prove for itself which fast paths are right on its device."""
        from lora_train import fast

        self._work, some = work, examples[:PROOF]
        if self._others:
            self._tell({"do": "prove"}, some)
        slow = self._slow()
        self._careful(
            lambda: fast.choose(
                work.forward, some, slow, lambda said, code: self._emit.log("warn", said, code)
            )
        )
        if not self._others:
            return
        layout = work.layout()
        for rank, answer in enumerate(self._collect(), start=1):
            for said, code in answer["slow"]:
                self._emit.log("warn", f"device {rank}: {said}", code)
            if self.sharded and answer["layout"] != layout:
                raise Failure("gpu_fault", f"device {rank} computes something else than device 0")
        said = f"{self.size} devices share every step"
        said += ", and the weights of the base model" if self.sharded else ""
        self._emit.log("info", said, "ranks")

    def _slow(self) -> Sequence[str]:
        from lora_train import shard

        return shard.slow(self._plan) if self.sharded else self._plan.slow_paths

    def groups(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        """The micro-batches of all ranks, as positions."""
        forward = self._known().forward
        if not self._others:
            return forward.groups(lengths, budget)
        out = []
        for share in shares(lengths, self.size):
            parts = forward.groups([lengths[i] for i in share], budget) if share else []
            out += [[share[i] for i in part] for part in parts]
        return out

    def mine(self, batch: Sequence[render.Sequence], budget: int) -> list[list[render.Sequence]]:
        """The micro-batches of rank 0."""
        share = shares([len(s.tokens) for s in batch], self.size)[0]
        lengths = [len(batch[i].tokens) for i in share]
        parts = self._known().forward.groups(lengths, budget) if share else []
        return [[batch[share[i]] for i in part] for part in parts]

    def gradients(
        self,
        batch: Sequence[render.Sequence],
        loss_tokens: int,
        step: int,
        budget: int,
        recompute: bool,
    ) -> torch.Tensor:
        """Fill the gradients of a whole step; its loss."""
        work, seed = self._known(), self._plan.hyperparameters.seed
        parts = self._parts(batch, budget)
        said = {"do": "gradients", "recompute": recompute, "loss_tokens": loss_tokens}
        for other in self._others:
            own = {**said, "seed": schedule.step_seed(seed, step, other.rank)}
            self._order_part(other, own, parts[other.rank])
        mine = schedule.step_seed(seed, step)
        total, answers = self._own(lambda: work.gradients(parts[0], loss_tokens, mine))
        if not self._others:
            return total
        for other in self._others:
            self._send(other, {"do": "reduce"})
        self._collective(work.gather)
        return total + sum(a["loss"] for a in answers)

    def held(self, batch: Sequence[render.Sequence], budget: int, recompute: bool) -> float:
        """The summed loss of examples, without gradients."""
        work, parts = self._known(), self._parts(batch, budget)
        for other in self._others:
            self._order_part(other, {"do": "held", "recompute": recompute}, parts[other.rank])
        total, answers = self._own(lambda: work.held(parts[0]))
        return total + sum(a["loss"] for a in answers)

    def trial(self, some: Sequence[render.Sequence], recompute: bool) -> None:
        """One forward and backward pass of this rank that counts for nothing."""
        forward = self._known().forward
        if not self.sharded:
            forward.nll(some).backward()
            return
        from lora_train.work import Part

        part = Part(some, sum(len(s.tokens) for s in some), 1)
        said = {"do": "gradients", "recompute": recompute, "loss_tokens": 1, "seed": 0}
        self._order += 1
        for other in self._others:
            self._order_part(other, said, part)
        self._own(lambda: forward.nll(some).backward())

    def _own(self, work: Callable[[], T]) -> tuple[T, list[dict[str, Any]]]:
        """Do this rank's part of an order and hear the others; raises when memory ran out."""
        if not self._others:
            return work(), []
        self._collective(self._known().spread)
        done, short = None, ""
        try:
            done = self._careful(work)
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            if self.sharded:
                said = f"the training does not fit into the memory of {self.size} devices"
                raise Failure("out_of_memory", said) from e
            short = f"rank 0: {e}"
        answers = self._answers(short)
        return cast(T, done), answers

    def close(self) -> None:
        """End the other ranks; they hold nothing that is not here."""
        if self._done.is_set():
            return
        self._done.set()
        for other in self._others:
            other.process.kill()
        for other in self._others:
            other.process.wait()
            other.channel.socket.close()
        if self._others:
            disconnect()
        self._others = []
        self._store.unlink(missing_ok=True)

    # --- Talking --------------------------------------------------------------

    def _known(self) -> Work:
        if self._work is None:
            raise AssertionError("the ranks have not joined")
        return self._work

    def _parts(self, batch: Sequence[render.Sequence], budget: int) -> list[Part]:
        """What each rank is to do with the next order."""
        from lora_train.work import Part

        self._order += 1
        split = [batch] if not self._others else []
        lengths = [len(s.tokens) for s in batch]
        split = split or [[batch[i] for i in p] for p in shares(lengths, self.size)]
        passes = 0
        if self.sharded:
            groups = self._known().forward.groups
            counts = [len(groups([len(s.tokens) for s in p], budget)) if p else 0 for p in split]
            passes = max(counts)
        return [Part(p, budget, passes) for p in split]

    def _order_part(self, other: _Other, said: dict[str, Any], part: Part) -> None:
        said = {**said, "budget": part.budget, "passes": part.passes}
        self._order_one(other, {**said, "patience": self._emit.patience}, part.sequences)

    def _tell(self, said: dict[str, Any], sequences: Sequence[render.Sequence] = ()) -> None:
        self._order += 1
        for other in self._others:
            self._order_one(other, said, sequences)

    def _order_one(
        self, other: _Other, said: dict[str, Any], sequences: Sequence[render.Sequence]
    ) -> None:
        sizes, load = channel.packed(sequences)
        self._send(other, {**said, "id": self._order, "sizes": sizes}, load)

    def _send(self, other: _Other, said: dict[str, Any], load: bytes = b"") -> None:
        try:
            other.channel.send(said, load)
        except OSError:
            raise self._loss(other) from None

    def _answers(self, short: str) -> list[dict[str, Any]]:
        """What all ranks have to say to the last order; raises when memory ran out on one."""
        if short:
            for other in self._others:
                self._send(other, {"drop": self._order})
        answers = self._collect(drop=True)
        short = short or next((a["memory"] for a in answers if "memory" in a), "")
        if short:
            raise MemoryError(short)
        return answers

    def _collect(self, drop: bool = False) -> list[dict[str, Any]]:
        """One answer of each rank to the last order, by rank.

        With `drop`, the others need not finish when one ran out of memory.
        """
        answers: dict[int, dict[str, Any]] = {}
        missing = {other.channel.socket: other for other in self._others}
        while missing:
            self._stop.check()
            ready, _, _ = select.select(list(missing), [], [], LOOK_SECONDS)
            for end in ready:
                other = missing[end]
                got = other.channel.receive()
                if got is None or "failed" in got[0]:
                    raise self._loss(other, None if got is None else got[0])
                said = got[0]
                if said["id"] != self._order:
                    continue
                answers[other.rank] = said
                del missing[end]
                self._emit.alive()
                if drop and "memory" in said:
                    for late in missing.values():
                        self._send(late, {"drop": self._order})
        return [answers[rank] for rank in sorted(answers)]

    def _collective(self, work: Callable[[], None]) -> None:
        patience = self._emit.patience
        self._emit.alive()
        self._emit.expect(min(patience, COLLECTIVE_SECONDS))
        self._careful(work)
        self._emit.expect(patience)

    def _careful(self, work: Callable[[], T]) -> T:
        """Do what may wait for other ranks; says which one is gone when that is why it fails."""
        try:
            return work()
        except RuntimeError as e:
            if is_out_of_memory(e):
                raise
            # The backend only knows that a connection broke; the rank knows why.
            ends = [other.channel.socket for other in self._others]
            ready = select.select(ends, [], [], LAST_WORDS_SECONDS)[0] if ends else []
            for other in self._others:
                if other.channel.socket in ready:
                    got = other.channel.receive()
                    if got is None or "failed" in got[0]:
                        raise self._loss(other, got and got[0]) from e
            raise

    # --- Ranks that are gone ----------------------------------------------------

    def _loss(self, other: _Other, said: dict[str, Any] | None = None) -> Failure:
        """Why a rank is gone: in its own words, if it left any."""
        while said is None or "failed" not in said:
            got = other.channel.receive()
            if got is None:
                break
            said = got[0]
        if said is not None and "failed" in said:
            words = said["failed"]
            message = f"device {other.rank}: {words['message']}"
            return Failure(words["kind"], message, words["hint"], words["detail"])
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.process.wait(LAST_WORDS_SECONDS)
        code = other.process.returncode
        how = "does not answer" if code is None else f"left with code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        return Failure("trainer_crashed", f"the process of device {other.rank} {how}")

    def _watch(self) -> None:
        """End this process when a rank is gone and the main thread cannot notice."""
        poll, by_fd = select.poll(), {}
        for other in self._others:
            with contextlib.suppress(OSError):
                fd = os.pidfd_open(other.process.pid)
                by_fd[fd] = other
                poll.register(fd, select.POLLIN)
        gone = None
        while gone is None and not self._done.is_set():
            gone = next((by_fd[fd] for fd, _ in poll.poll(1000)), None)
        for fd in by_fd:
            os.close(fd)
        if gone is None or self._done.wait(STUCK_SECONDS):
            return
        code = session.say_failure(self._emit, self._loss(gone))
        self._emit.close()
        os._exit(code)


def _visible(device: str, size: int) -> list[str]:
    """The names of the devices, one for each rank; empty on the CPU."""
    if device != "cuda":
        return []
    names = [n for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n]
    if len(names) < size:
        raise Failure(
            "device_unavailable",
            f"{size} devices are wanted, CUDA_VISIBLE_DEVICES names {len(names)}",
        )
    return names
