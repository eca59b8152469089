"""Tokens are kept from job to job, believed only with proof, and made beside the loading."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, make_plan, play

from lora_train import beside, cache, checkpoint, loop, render
from lora_train.failure import Failure
from lora_train.stop import Preempted

NAME = "0" * 64
ENTRY = cache.Entry(
    {
        2: render.made(2, [1, 2, 3, 70000], [0, 1, 1, 0]),
        5: None,
        9: render.made(9, [4], [1], shortened=True),
    },
    {2: Counter({"<|end|>": 2})},
)
LINES = [2, 5, 9]


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    assert cache.store(tmp_path / "tokens", NAME, ENTRY) == ""
    return tmp_path / "tokens"


def test_what_was_kept_comes_back(kept: Path) -> None:
    assert cache.load(kept, NAME, LINES) == (ENTRY, "")
    assert cache.load(kept, "1" * 64, LINES) == (None, "")
    path = kept / f"{NAME}.safetensors"
    assert path.stat().st_mode & 0o777 == 0o600 and kept.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in kept.iterdir()] == [path.name]


@pytest.mark.parametrize("at", [4, 60, -1])
def test_a_flipped_bit_is_noticed(at: int, kept: Path) -> None:
    path = kept / f"{NAME}.safetensors"
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    entry, why = cache.load(kept, NAME, LINES)
    assert entry is None and why and not path.exists()


def test_what_others_could_have_written_is_not_believed(kept: Path, tmp_path: Path) -> None:
    path = kept / f"{NAME}.safetensors"
    path.chmod(0o644)
    assert cache.load(kept, NAME, LINES) == (None, "it is not ours alone")
    assert cache.store(kept, NAME, ENTRY) == ""
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.load(kept, NAME, LINES)[0] is None
    kept.chmod(0o777)
    assert "others may write" in cache.store(kept, NAME, ENTRY)
    assert cache.load(kept, NAME, [2, 5])[0] is None


def test_it_does_not_grow_for_ever(kept: Path) -> None:
    size = (kept / f"{NAME}.safetensors").stat().st_size
    for n in range(1, 4):
        os.utime(kept / f"{NAME}.safetensors")  # still in use
        assert cache.store(kept, str(n) * 64, ENTRY, most=2 * size) == ""
        os.utime(kept / f"{str(n) * 64}.safetensors", (n, n))
    assert sorted(p.name[0] for p in kept.iterdir()) == ["0", "3"]
    assert "MiB" in cache.store(kept, NAME, ENTRY, most=size - 1)


def test_the_name_is_all_that_tokens_follow_from(model: Path, tmp_path: Path) -> None:
    versions = {"tokenizers": "1", "transformers": "1", "torch": "1"}
    name = cache.key("a", model, 512, versions)
    assert name == cache.key("a", model, 512, {**versions, "torch": "2"})
    other = tmp_path / "other"
    other.mkdir()
    for p in model.iterdir():
        text = p.read_bytes()
        same = p.name != "tokenizer_config.json"
        (other / p.name).write_bytes(text if same else text.replace(b"<|user|>", b"<|you|>"))
    names = [
        cache.key("b", model, 512, versions),
        cache.key("a", model, 511, versions),
        cache.key("a", other, 512, versions),
        cache.key("a", model, 512, {**versions, "tokenizers": "2"}),
    ]
    assert len({name, *names}) == 5


def test_a_second_job_finds_the_tokens_of_the_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hyper = {"epochs": 1, "dropout": 0.0, "batch_size": 16}
    monkeypatch.setattr(loop.reload, "prove", lambda *asked, **_: asked[3])  # has tests of its own
    over: dict[str, Any] = {"hyper": hyper, "cache_dir": str(tmp_path / "tokens")}
    first = play(make_plan(tmp_path / "first", DEMO, model, **over))
    # The merged model is tested elsewhere; a plan that wants it gets it.
    file = checkpoint.File("merged/model.safetensors", 7, "ab")
    monkeypatch.setattr(loop.merge, "write", lambda *_: [file])
    second = play(make_plan(tmp_path / "second", DEMO, model, merged=True, **over))
    assert second.of("result")[0]["files"][-1] == file.plain()
    assert not first.logs("merged") and "1 files, 7 bytes" in second.logs("merged")[0]
    assert first.code == second.code == 0
    assert not first.logs("token_cache") and "already" in second.logs("token_cache")[0]
    assert second.losses() == first.losses()
    assert second.logs("training_sample") == first.logs("training_sample")


def test_errors_of_either_side_are_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"hyper": {"max_seq_length": 20}}
    run = play(make_plan(tmp_path / "data", DEMO, model, **short))
    assert run.code == 65 and "longer than 20 tokens" in run.of("error")[0]["message"]
    assert [e["stage"] for e in run.of("stage")] == ["preparing", "loading_model"]

    def fails(_: Any, on_host: bool) -> None:
        raise Failure("device_unavailable", "no device")

    monkeypatch.setattr(loop.model, "load", fails)
    for name, over in (("model", {}), ("both", short)):
        run = play(make_plan(tmp_path / name, DEMO, model, **over))
        assert run.code == 69 and not run.of("log")
    assert not [t for t in threading.enumerate() if t.name == "beside"]


def test_the_wish_to_leave_ends_the_work_beside() -> None:
    began, asked = threading.Event(), threading.Event()

    def check() -> None:
        if asked.is_set():
            raise Preempted("SIGTERM")

    def work(beat: beside.Check) -> None:
        began.set()
        while True:
            beat()
            time.sleep(0.001)

    with beside.Beside(work, check) as one:
        assert began.wait(10)
        asked.set()
        with pytest.raises(Preempted):
            one.result()
    asked.clear()
    with beside.Beside(work, check):
        pass  # it ends without a wish as well
    assert not [t for t in threading.enumerate() if t.name == "beside"]
