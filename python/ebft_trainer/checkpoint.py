"""Checkpoints that are whole or absent, whenever the process that writes them is killed.

A checkpoint is written into the folder ``_unfinished`` of the run, flushed to the disk with a manifest of its files,
and only then renamed to ``checkpoint-N``. The manifest tells damage that comes later.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .results import read_json_object

MANIFEST = "ebft_checkpoint.json"
STATE_FILE = "trainer_state.json"
# transformers does not upload what begins with an underscore.
UNFINISHED = "_unfinished"
_CHUNK = 1 << 24
# What a run that is resumed reads: none of it may stand beside a manifest that does not know it.
_LOADED = re.compile(
    r"(model|pytorch_model|adapter_model).*\.(safetensors|bin)(\.index\.json)?|(optimizer|scheduler|scaler)\.(pt|bin)"
    rf"|rng_state.*\.pth|{re.escape(STATE_FILE)}"
)


class CheckpointError(OSError):
    """A checkpoint cannot be written, or is not whole; the message names folder, file and reason."""


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Create ``folder`` if there is none; raises CheckpointError if no file can be written to it."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"output_dir: expected a folder that can be written to, got {str(folder)!r}: {error.strerror}"
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says which file could not be written, and how much room there is."""
    try:
        yield
    except OSError as error:
        room = f"{shutil.disk_usage(path.parent).free / 1e9:.3g} GB free" if path.parent.is_dir() else "no such folder"
        raise CheckpointError(f"output: cannot write {str(path)!r}: {error.strerror} ({room})") from error


def start_unfinished(run: Path) -> None:
    """An empty folder for what is about to be written; an earlier attempt that was interrupted is deleted.

    ``run`` must exist: one that was deleted while it was written to is not to appear again as if it were whole.
    """
    discard_unfinished(run)
    (run / UNFINISHED).mkdir(exist_ok=True)


def discard_unfinished(run: Path) -> None:
    """Delete what was not finished, and free its space."""
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)


def publish(run: Path, name: str, *, manifest: bool = True) -> None:
    """Turn the finished ``_unfinished/<name>`` into ``<name>``, in the place of an earlier one if need be."""
    finished = run / UNFINISHED / name
    if manifest:
        _write_manifest(finished)
    _flush_all(finished)
    _retire(run / name)
    finished.rename(run / name)
    _flush(run)
    discard_unfinished(run)


def keep_newest(run: Path, limit: int | None, *protected: str | None) -> None:
    """Delete the oldest checkpoints of a run until ``limit`` are left; never one of the ``protected`` folders."""
    if not limit or limit < 0:
        return
    kept = {Path(folder) for folder in protected if folder is not None}
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime_ns)
    surplus = len(checkpoints) - max(limit, len(kept))
    for folder in [folder for folder in checkpoints if folder not in kept][: max(surplus, 0)]:
        _retire(folder)
    discard_unfinished(run)


class WholeCheckpoint(str):
    """The path of a checkpoint that `check_whole` has read."""


def check_whole(folder: str | os.PathLike[str]) -> WholeCheckpoint:
    """Compare a checkpoint with its manifest; reads every file.

    Raises:
        CheckpointError: it is no finished checkpoint, or the first file that is missing, was changed or added.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"resume_from_checkpoint: expected a checkpoint folder, got {str(folder)!r}")
    files = _read_manifest(folder)
    for name, (size, digest) in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            reason = f"expected {size} bytes of {name}, got {'no file' if found is None else found}"
        elif _digest(path) != digest:
            reason = f"{name} was changed after it was saved"
        else:
            continue
        raise CheckpointError(
            f"resume_from_checkpoint: {str(folder)!r} is damaged: {reason}{_other_checkpoints(folder)}"
        )
    unknown = sorted(path.name for path in folder.iterdir() if _LOADED.fullmatch(path.name) and path.name not in files)
    if unknown:
        raise CheckpointError(
            f"resume_from_checkpoint: {str(folder)!r} is damaged: {unknown[0]} is not in {MANIFEST}"
            f"{_other_checkpoints(folder)}"
        )
    return WholeCheckpoint(folder)


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    try:
        files = read_json_object(folder / MANIFEST)["files"]
        files = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"resume_from_checkpoint: {str(folder)!r} is not a whole checkpoint: no readable {MANIFEST} "
            f"({type(error).__name__}: {error})"
        ) from error
    if STATE_FILE not in files:
        raise CheckpointError(
            f"resume_from_checkpoint: {str(folder)!r} is not a whole checkpoint: expected {STATE_FILE} in {MANIFEST}, "
            f"got {', '.join(sorted(files)) or 'no files'}"
        )
    return files


def _other_checkpoints(damaged: Path) -> str:
    others = sorted(folder.name for folder in damaged.parent.glob("checkpoint-*") if folder != damaged)
    return f"; other checkpoints there: {', '.join(others)}" if others else ""


def _write_manifest(folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): (path.stat().st_size, _digest(path)) for path in paths}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _flush_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder, folder.parent):
        _flush(path)


def _retire(folder: Path) -> None:
    """Delete a checkpoint so that at no moment half of one bears its name."""
    if folder.exists():
        (folder.parent / UNFINISHED).mkdir(exist_ok=True)
        # Beside what `_unfinished` may hold under the same name.
        aside = Path(tempfile.mkdtemp(dir=folder.parent / UNFINISHED))
        folder.rename(aside / folder.name)
        shutil.rmtree(aside, ignore_errors=True)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """To the disk, file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
