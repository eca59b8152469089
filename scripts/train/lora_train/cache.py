"""Tokens of a data file, kept on the host from one job to the next.

The name of an entry is a digest of all that the tokens follow from: the data
file, the tokenizer with its template, the longest example, our code and the
libraries. What is done with an example that is too long, and merging, come
after it. An entry is readable by this user alone, written aside and renamed,
and believed only when its own digest fits. There is no pickle in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_train import render

FORMAT = 1
MOST_BYTES = 2 << 30  # of all entries
MOST_ENTRY = 512 << 20
STALE_SECONDS = 3600.0  # after which a file that nobody finished is removed
CODE = ("data.py", "guard.py", "render.py", "template.py")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
MOST_TOKENIZER = 256 << 20

Rendered = dict[int, "render.Sequence | None"]


@dataclass
class Entry:
    """What was rendered, by line, and the control tokens that stood in the user's text."""

    rendered: Rendered
    control: dict[int, Counter[str]] = field(default_factory=dict)


class _Damaged(Exception):
    """An entry that cannot be believed, and why."""


def key(data_sha256: str, model: Path, longest: int, versions: Mapping[str, str]) -> str:
    """The name of the tokens of a data file."""
    here = Path(__file__).parent
    about = {
        "format": FORMAT,
        "data": data_sha256,
        "longest": longest,
        "tokenizer": {
            p.name: _digest(p)
            for p in sorted(model.iterdir())
            if p.is_file() and p.suffix not in WEIGHTS and p.stat().st_size <= MOST_TOKENIZER
        },
        "code": {name: _digest(here / name) for name in CODE},
        "libraries": {n: versions.get(n, "") for n in ("transformers", "tokenizers")},
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load(directory: Path, name: str, lines: Iterable[int]) -> tuple[Entry | None, str]:
    """The entry of a name that holds these lines; what is wrong with it, else empty.

    An entry that cannot be believed is removed.
    """
    path = directory / f"{name}.safetensors"
    try:
        _check_directory(directory)
        entry = _unpack(_read(path))
        if list(entry.rendered) != list(lines):
            raise _Damaged("it has other lines")
    except FileNotFoundError:
        return None, ""
    except _Damaged as e:
        with contextlib.suppress(OSError):
            path.unlink()
        return None, str(e)
    except OSError as e:
        return None, e.strerror or str(e)
    with contextlib.suppress(OSError):
        os.utime(path)  # the one that nobody used for longest goes first
    return entry, ""


def store(directory: Path, name: str, entry: Entry, most: int = MOST_BYTES) -> str:
    """Keep an entry, and no more than `most` bytes of all; why it is not kept, else empty."""
    temp = directory / f".tmp-{os.getpid()}-{name}"
    try:
        directory.mkdir(parents=True, mode=0o700, exist_ok=True)
        _check_directory(directory)
        raw = _pack(entry)
        if len(raw) > min(most, MOST_ENTRY):
            return f"it has {len(raw) >> 20} MiB"
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as f:
            f.write(raw)
        temp.rename(directory / f"{name}.safetensors")
        _prune(directory, most)
    except (OSError, _Damaged) as e:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        return str(e)
    return ""


def _check_directory(directory: Path) -> None:
    about = directory.lstat()
    if not stat.S_ISDIR(about.st_mode):
        raise NotADirectoryError(20, "it is no directory", str(directory))
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise PermissionError(13, "others may write there", str(directory))


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(fd, "rb") as f:
        about = os.fstat(fd)
        ours = about.st_uid == os.geteuid() and not about.st_mode & 0o077
        if not (stat.S_ISREG(about.st_mode) and ours):
            raise _Damaged("it is not ours alone")
        if about.st_size > MOST_ENTRY:
            raise _Damaged("it is too large")
        return f.read()


def _pack(entry: Entry) -> bytes:
    import numpy as np
    from safetensors.numpy import save

    tokens, trained = array("i"), bytearray()
    kinds, lengths = bytearray(), array("i")
    for s in entry.rendered.values():
        kinds.append(0 if s is None else 1 + s.shortened)
        lengths.append(0 if s is None else len(s.tokens))
        if s is not None:
            tokens.extend(s.tokens)
            trained += bytes(map(bool, s.trained))
    tensors = {
        "kinds": np.frombuffer(bytes(kinds), np.uint8),
        "lengths": np.array(lengths, np.int32),
        "lines": np.array(list(entry.rendered), np.int32),
        "tokens": np.array(tokens, np.int32),
        "trained": np.frombuffer(bytes(trained), np.uint8),
    }
    control = json.dumps({str(k): dict(v) for k, v in sorted(entry.control.items())})
    about = {"control": control, "sha256": _sum(tensors, control)}
    return save(tensors, metadata=about)


def _sum(tensors: Mapping[str, Any], control: str) -> str:
    digest = hashlib.sha256(control.encode())
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name].shape}:{tensors[name].dtype}".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _unpack(raw: bytes) -> Entry:
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_tensors

    try:
        tensors = load_tensors(raw)
        head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        control, digest = head["__metadata__"]["control"], head["__metadata__"]["sha256"]
        if _sum(tensors, control) != digest:
            raise _Damaged("its digest does not fit")
        parts = [tensors[n] for n in ("kinds", "lengths", "lines", "tokens", "trained")]
        kinds, lengths, lines, tokens, trained = parts
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise _Damaged("it cannot be read") from None
    rendered, at = Rendered(), 0
    flat, marks = array("i", tokens.tobytes()), trained.tobytes()
    for line, kind, length in zip(lines.tolist(), kinds.tolist(), lengths.tolist(), strict=True):
        end = at + length
        rendered[line] = (
            render.Sequence(line, flat[at:end], marks[at:end], kind == 2) if kind else None
        )
        at = end
    told = json.loads(control)
    return Entry(rendered, {int(k): Counter(v) for k, v in told.items()})


def _prune(directory: Path, most: int) -> None:
    """Remove what was not used for longest, until the rest fits."""
    there = []
    for path in directory.iterdir():
        with contextlib.suppress(OSError):
            about = path.lstat()
            if path.name.startswith(".tmp-"):
                if time.time() - about.st_mtime > STALE_SECONDS:
                    path.unlink()
            elif path.suffix == ".safetensors":
                there.append((about.st_mtime_ns, about.st_size, path))
    total = sum(size for _, size, _ in there)
    for _, size, path in sorted(there):
        if total <= most:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
