"""A process that waits for its one plan, with everything imported."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from lora_train import __main__ as program
from lora_train import session, standby


def test_a_standby_takes_one_job_with_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("TMPDIR", "/nowhere")
    read, write = os.pipe()
    env = {"CUDA_VISIBLE_DEVICES": "GPU-a", "TMPDIR": str(tmp_path)}
    os.write(write, json.dumps({"plan": "/run/plan.json", "env": env}).encode() + b"\n")
    job = standby.wait(read)
    os.close(write)
    assert job is not None and job == standby.Job(Path("/run/plan.json"), env)
    standby.become(job)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a"
    assert tempfile.gettempdir() == str(tmp_path)
    tempfile.tempdir = None


def test_a_standby_without_the_extra_is_not_for_four_bits(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for quantisation, fit in (("none", True), ("nf4", False)):
        path.write_text(json.dumps({"quantisation": quantisation}))
        assert standby.fit(standby.Job(path, {})) == fit
    assert standby.fit(standby.Job(tmp_path / "missing", {}))


def test_a_standby_that_nobody_wants_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.write(write, b'{"plan": "/half')
    os.close(write)
    monkeypatch.setattr(standby, "warm", lambda: None)
    right = standby.wait
    monkeypatch.setattr(standby, "wait", lambda: right(read))
    assert program.main(["--standby"]) == 0


def test_the_age_of_this_process_is_known() -> None:
    import time

    assert 0 < time.monotonic() - session.process_began() < 24 * 3600
