"""A rank beside rank 0: it loads the model, does what it is told, and decides nothing.

It ends with rank 0, whatever becomes of that: the kernel kills it when its
parent dies, and it leaves when its channel ends. Signals that ask the group to
leave are blocked here.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from lora_train import channel, failure, plan
from lora_train.channel import Channel
from lora_train.failure import is_out_of_memory

PR_SET_PDEATHSIG = 1


class Dropped(Exception):
    """Nobody wants the answer to this order any more."""


class _Orders:
    """What rank 0 said, read in a thread: an order may be dropped while it is worked on."""

    def __init__(self, to: Channel) -> None:
        self._channel = to
        self._dropped = 0
        self._waiting: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def _read(self) -> None:
        while (got := self._channel.receive()) is not None:
            if "drop" in got[0]:
                self._dropped = got[0]["drop"]
            else:
                self._waiting.put(got)
        os._exit(failure.OK)

    def next(self) -> tuple[dict[str, Any], bytes]:
        """Wait for the next order."""
        return self._waiting.get()

    def check(self, order: int) -> None:
        """Raise Dropped when the order was."""
        if self._dropped >= order:
            raise Dropped


def _work_for(to: Channel, patch: Callable[[], None]) -> None:
    """Load what rank 0 says and serve it until it is gone."""
    got = to.receive()
    if got is None:
        return
    said = got[0]
    one, rank = plan.parse(said["plan"]), said["rank"]
    orders = _Orders(to)
    import torch

    from lora_train import fast, memory, model, packing, ranks, shard
    from lora_train.work import Part, Work

    patch()
    if one.threads:
        torch.set_num_threads(one.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    now, recomputed = 0, False
    order, _ = orders.next()
    sharded, now = order["sharded"], order["id"]
    loaded = model.load(one, on_host=sharded)
    to.send({"id": now})
    orders.next()
    ranks.connect(one.device, rank, said["size"], said["store"])
    if sharded:
        shard.spread(loaded, one.device)
    forward = packing.Forward(loaded, one.device)
    # Ranks that share the weights cannot stop alone.
    work = Work(forward, one.device, before=lambda: None if sharded else orders.check(now))
    while True:
        order, load = orders.next()
        now = order.get("id", now)
        sequences = channel.unpacked(order.get("sizes", []), load)
        answer: dict[str, Any] = {"id": now}
        # Rank 0 gives up then; these are the stacks of the one that stands still.
        if patience := order.get("patience"):
            faulthandler.dump_traceback_later(0.9 * patience)
        try:
            match order["do"]:
                case "prove":
                    notes: list[tuple[str, str]] = []
                    slow = shard.slow(one) if sharded else one.slow_paths
                    fast.choose(forward, sequences, slow, lambda *said, to=notes: to.append(said))
                    answer |= {"slow": notes, "layout": work.layout()}
                case "reduce":
                    work.gather()
                    continue
                case _:
                    work.spread()
                    if order["recompute"] and not recomputed:
                        recomputed = memory.recompute(forward.base)
                    part = Part(sequences, order["budget"], order["passes"])
                    if order["do"] == "held":
                        answer["loss"] = work.held(part)
                    else:
                        total = work.gradients(part, order["loss_tokens"], order["seed"])
                        answer["loss"] = total.item()
        except Dropped:
            answer["dropped"] = True
        except Exception as e:
            if sharded or not is_out_of_memory(e):
                raise
            answer["memory"] = f"rank {rank}: {e}"
        finally:
            faulthandler.cancel_dump_traceback_later()
        if "loss" not in answer and "slow" not in answer:
            work.clear()
            memory.release(one.device)
        to.send(answer)


def serve(fd: int, patch: Callable[[], None] = lambda: None) -> None:
    """Serve rank 0 on one end of its channel; does not return."""
    to = Channel(socket.socket(fileno=fd))
    try:
        _work_for(to, patch)
    except BaseException as e:
        end = failure.classify(e)
        words = {"kind": end.kind, "message": end.message, "hint": end.hint, "detail": end.detail}
        with contextlib.suppress(OSError):
            to.send({"failed": words})
        print(end.detail or end.message, file=sys.stderr, flush=True)
        os._exit(end.code)
    os._exit(failure.OK)


def main() -> None:
    """The whole life of the process."""
    fd, parent = map(int, sys.argv[-2:])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before we asked to go with it
        os._exit(failure.OK)
    serve(fd)


if __name__ == "__main__":
    main()
