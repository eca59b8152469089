"""`python -m lora_train --plan FILE`: train one LoRA adapter as the plan says."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from lora_train import __version__, failure, plan, session, standby, wire
from lora_train.failure import Failure
from lora_train.stop import Stop

# Nothing here may reach the network, and the library must not look for other frameworks.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "USE_TF": "0",
    "USE_FLAX": "0",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit code."""
    events = wire.given_fd(wire.EVENTS_FD, write=True)
    commands = wire.given_fd(wire.COMMANDS_FD, write=False)
    parser = argparse.ArgumentParser(prog="lora_train", description="Train one LoRA adapter.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", type=Path, help="the plan file of one attempt")
    what.add_argument(
        "--standby",
        action="store_true",
        help=f"import everything, then wait for one plan on descriptor {standby.JOB_FD}",
    )
    what.add_argument("--check", action="store_true", help="print what is installed, as JSON")
    what.add_argument("--version", action="version", version=__version__)
    args = parser.parse_args(argv)
    os.environ.update(ENVIRONMENT)
    if args.check:
        return check()
    if args.standby:
        standby.warm()
        job = standby.wait()
        if job is None:
            return failure.OK
        standby.become(job)
        if not standby.fit(job):
            argv = [sys.executable, "-m", "lora_train", "--plan", str(job.plan)]
            os.execv(sys.executable, argv)
        return train(job.plan, events, commands, time.monotonic())
    return train(args.plan, events, commands, session.process_began())


def train(path: Path, events: int | None, commands: int | None, began: float) -> int:
    """Carry out one plan file; `began` is when somebody wanted it, by the monotonic clock."""
    raw: dict[str, Any] = {}
    checked: plan.Plan | None = None
    wrong: Failure | None = None
    try:
        raw = plan.read(path)
        checked = plan.parse(raw)
    except Failure as e:
        wrong = e
    emit, trouble = _emitter(raw, events)
    wrong = wrong or trouble
    if checked is None or wrong is not None:
        end = wrong or Failure("plan_invalid", "the plan is empty")
        print(f"lora_train: {end.message}", file=sys.stderr)
        code = session.say_failure(emit, end)
        emit.close()
        return code
    stop = Stop(ignore=checked.backend == "dry" and checked.dry.ignore_sigterm)
    stop.install()
    if commands is not None:
        wire.listen(stop, commands)
    heart = wire.Heartbeat(emit, lambda idle: _leave_hanging(emit, idle))
    heart.start()
    one = session.Session(plan=checked, emit=emit, stop=stop, wait=stop.wait, began=began)
    if checked.backend == "dry":
        from lora_train.backends import dry as backend
    else:
        from lora_train import ranks as backend
    code = session.perform(one, backend.run)
    heart.close()
    emit.close()
    return code


def _emitter(raw: dict[str, Any], events: int | None) -> tuple[wire.Emitter, Failure | None]:
    """An emitter even for a plan that is wrong, as far as it can be read."""
    job, attempt, run_dir = raw.get("job"), raw.get("attempt"), raw.get("run_dir")
    who: dict[str, Any] = {
        "job": job if isinstance(job, str) else "",
        "attempt": attempt if isinstance(attempt, int) else 0,
        "fd": events,
    }
    if not isinstance(run_dir, str) or not Path(run_dir).is_absolute():
        return wire.Emitter(**who), None
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        return wire.Emitter(**who, path=Path(run_dir) / "events.jsonl"), None
    except OSError as e:
        end = failure.classify(e)
        if end.kind == "trainer_crashed":
            end = Failure("plan_invalid", f"run_dir {run_dir} cannot be used: {e.strerror}")
        return wire.Emitter(**who), end


def _leave_hanging(emit: wire.Emitter, idle: float) -> None:
    """End the process from the heartbeat's thread: the main thread does not answer."""
    wire.dump_stacks()
    end = Failure("hang", f"no progress for {idle:.0f} s while {emit.stage_now or 'starting'}")
    code = session.say_failure(emit, end)
    emit.close()
    os._exit(code)


def check() -> int:
    """Print one JSON line for the agent's doctor; 69 when torch cannot be used."""
    report: dict[str, Any] = {
        "ok": True,
        "trainer": __version__,
        "python": platform.python_version(),
        **session.library_versions(),
        "cuda": False,
        "devices": [],
        "error": "",
    }
    try:
        import peft  # noqa: F401
        import torch
        import transformers  # noqa: F401

        report["cuda"] = torch.cuda.is_available()
        if report["cuda"]:
            count = torch.cuda.device_count()
            report["devices"] = [torch.cuda.get_device_name(i) for i in range(count)]
    except Exception as e:
        report["ok"], report["error"] = False, f"{type(e).__name__}: {failure.one_line(str(e))}"
    print(json.dumps(report))
    return failure.OK if report["ok"] else failure.EXIT_CODES["device_unavailable"]


def _leave(code: int) -> None:
    """Leave without tearing libraries down: that costs seconds and can crash."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
