"""Directories that are complete or do not exist.

A directory is written beside its place, synced, named in a manifest of sizes
and digests, and renamed. Readers trust a manifest that verifies and nothing
else. There is no pickle here: tensors arrive as safetensors bytes, the rest
is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
VERSION = 1


class Damaged(Exception):
    """A directory whose manifest is missing or does not verify."""


@dataclass(frozen=True)
class File:
    """One file of a directory."""

    name: str
    bytes: int
    sha256: str

    def plain(self) -> dict[str, Any]:
        """The form of manifests and events."""
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256}


@dataclass(frozen=True)
class Saved:
    """A directory that was written or verified; files[-1] is its manifest."""

    path: Path
    step: int
    files: tuple[File, ...]
    manifest: dict[str, Any]

    @property
    def manifest_sha256(self) -> str:
        """The digest of the manifest, which vouches for all the rest."""
        return self.files[-1].sha256

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(f.bytes for f in self.files)


def directory_name(step: int) -> str:
    """The name of the checkpoint of a step; names sort as steps do."""
    return f"step-{step:08d}"


def write(
    target: Path,
    step: int,
    files: Mapping[str, bytes],
    extra: Mapping[str, Any] | None = None,
    between: Callable[[], None] = lambda: None,
) -> Saved:
    """Write a directory in one go; `between` runs before each file and may raise."""
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob(f".tmp-{target.name}-*"):
        shutil.rmtree(stale)
    temp = parent / f".tmp-{target.name}-{os.getpid()}"
    temp.mkdir()
    try:
        written = []
        for name, content in files.items():
            between()
            written.append(_write_file(temp / name, content))
        manifest = {
            "v": VERSION,
            "step": step,
            "files": [f.plain() for f in written],
            **(extra or {}),
        }
        between()
        written.append(_write_file(temp / MANIFEST, _json_bytes(manifest)))
        _sync(temp)
        if target.exists():
            shutil.rmtree(target)
        temp.rename(target)
        _sync(parent)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    return Saved(target, step, tuple(written), manifest)


def _json_bytes(value: Any) -> bytes:  # noqa: ANN401
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _write_file(path: Path, content: bytes) -> File:
    with path.open("xb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    return File(path.name, len(content), hashlib.sha256(content).hexdigest())


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def verify(path: Path) -> Saved:
    """The directory as its manifest describes it; Damaged when that is not so."""
    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        version, step = manifest["v"], manifest["step"]
        entries = [File(f["name"], f["bytes"], f["sha256"]) for f in manifest["files"]]
    except OSError as e:
        raise Damaged(f"{path.name}: no manifest ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged(f"{path.name}: the manifest cannot be read") from None
    if version != VERSION or not isinstance(step, int):
        raise Damaged(f"{path.name}: the manifest is of version {version}, not {VERSION}")
    for f in entries:
        _verify_file(path, f)
    last = File(MANIFEST, len(raw), hashlib.sha256(raw).hexdigest())
    return Saved(path, step, (*entries, last), manifest)


def _verify_file(path: Path, f: File) -> None:
    if not isinstance(f.name, str) or f.name != Path(f.name).name or f.name in ("", ".", ".."):
        raise Damaged(f"{path.name}: {f.name!r} is not the name of a file")
    file = path / f.name
    try:
        if file.is_symlink() or not file.is_file():
            raise Damaged(f"{path.name}: {f.name} is not there")
        if file.stat().st_size != f.bytes:
            raise Damaged(f"{path.name}: {f.name} has another size than its manifest says")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as e:
        raise Damaged(f"{path.name}: {f.name} cannot be read ({e.strerror})") from None
    if digest != f.sha256:
        raise Damaged(f"{path.name}: {f.name} differs from its manifest")


def candidates(wanted: Path, own: Path) -> list[Path]:
    """Where to look for a checkpoint: the wanted one, then older ones, newest first.

    Older ones stand beside the wanted directory and in this run's own.
    """
    others = {p.resolve(): p for root in (own, wanted.parent) for p in root.glob("step-*")}
    others.pop(wanted.resolve(), None)
    older = [p for p in others.values() if not _is_step(wanted) or p.name < wanted.name]
    return [wanted, *sorted(older, key=lambda p: p.name, reverse=True)]


def _is_step(path: Path) -> bool:
    return path.name.startswith("step-") and path.name[5:].isdigit()


def newest(
    wanted: Path, own: Path, complain: Callable[[str], None] = lambda _: None
) -> Saved | None:
    """The newest checkpoint that verifies, not newer than the wanted one."""
    for path in candidates(wanted, own):
        try:
            return verify(path)
        except Damaged as e:
            complain(str(e))
    return None


def prune(root: Path, keep: int, newest_step: int) -> None:
    """Keep the last few checkpoints, and in any case the one just written."""
    all_of_them = sorted(p for p in root.glob("step-*") if _is_step(p))
    for path in all_of_them[:-keep]:
        if path.name != directory_name(newest_step):
            # The manifest goes first: what remains after a crash here does not verify.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
