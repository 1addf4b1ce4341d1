"""A run's folder: which process owns it, what the run was started with, and what of it may be deleted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from .checkpoint import UNFINISHED, CheckpointError
from .completions import COMPLETIONS_FILE
from .monitor import LOG_FILE
from .results import CONFIG_FILE, MODEL_FOLDER, RESULT_FILE, RUN_FILE, flat, read_json_object

try:
    import fcntl
except ImportError:  # no such locks on this system: an owner's sign of life decides
    fcntl = None

LOCK_FILE = "ebft.lock"
#: Seconds between two signs of life of an owner, and without any after which it is taken for dead.
SIGN_OF_LIFE, DEAD_AFTER = 10.0, 60.0

#: Files of this many bytes in all are read whole for a fingerprint; of more, as many blocks as make up so much.
WHOLE, BLOCK = 2**30, 2**20

_MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")
_WRITTEN = re.compile(
    rf"({RUN_FILE}|{CONFIG_FILE}|{RESULT_FILE}|{LOG_FILE}|{COMPLETIONS_FILE}|{MODEL_FOLDER})(\.tmp)?|checkpoint-\d+|{UNFINISHED}"
)

#: Training arguments in which a run may differ from the one that it resumes: how long, and what is told of it.
MAY_CHANGE = frozenset(
    "max_steps num_train_epochs logging_steps save_steps save_total_limit report_to log_completions grad_norm_terms "
    "max_nonfinite_steps activation_checkpointing gradient_checkpointing shard_feature_network".split()
)


class FolderInUse(CheckpointError):
    """Another process writes to the folder; the message names it and its host."""


class _Lock:
    """The file ``ebft.lock`` in a folder, with its owner's process and host.

    On one machine the kernel's lock on the file decides: it ends with the process, however that ends. Between machines,
    where not every file system carries it, the owner's sign of life does: the file's time, renewed by a thread.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.users = folder / LOCK_FILE, 1
        self._file = self._open()
        try:
            self._check_free()
            owner = {"process": os.getpid(), "host": socket.gethostname(), "machine": _machine()}
            owner["since"] = datetime.now().isoformat(" ", "seconds")
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, json.dumps(owner).encode())
        except BaseException:
            os.close(self._file)
            raise
        self._ended = threading.Event()
        threading.Thread(target=self._live, name="ebft-lock", daemon=True).start()

    def _open(self) -> int:
        """The file, opened while it is not deleted by an owner that is just leaving."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            self._locked = _lock(file)
            if self._locked is False or _same_file(file, self.path):
                return file
            os.close(file)

    def _check_free(self) -> None:
        owner = _owner(self._file)
        # The kernel's lock says all of this machine; of others only their sign of life.
        if self._locked and owner.get("machine") in (None, _machine()):
            return
        silent = self._silence()
        if self._locked is not False and (not owner or silent > DEAD_AFTER):
            return
        raise FolderInUse(
            f"output: {str(self.path.parent)!r} is in use by process {owner.get('process', 'unknown')} on host "
            f"{owner.get('host', 'unknown')} since {owner.get('since', 'a moment ago')} (sign of life "
            f"{max(silent, 0):.0f} s ago); wait for it to end, if its machine is gone {DEAD_AFTER:.0f} s from then on, "
            "or choose another folder"
        )

    def _silence(self) -> float:
        """Seconds since the owner's sign of life, by the clock of the file system."""
        with tempfile.TemporaryFile(dir=self.path.parent) as now:
            return os.fstat(now.fileno()).st_mtime - os.fstat(self._file).st_mtime

    def _live(self) -> None:
        while not self._ended.wait(SIGN_OF_LIFE):
            try:
                os.utime(self._file)
            except OSError:
                return  # closed, or the disk is gone: `check` will say so

    def check(self) -> None:
        """Raise CheckpointError if the folder is no longer the one that was locked."""
        if not _same_file(self._file, self.path):
            raise CheckpointError(
                f"output: {str(self.path.parent)!r} or {LOCK_FILE} in it was deleted while the run was going on"
            )

    def release(self) -> None:
        self._ended.set()
        if _same_file(self._file, self.path):
            self.path.unlink()
        os.close(self._file)

    def forget(self) -> None:
        """In a forked child: the lock is the parent's alone, and must not outlive it here."""
        os.close(self._file)


_owned: dict[Path, _Lock] = {}


def _forget_all() -> None:
    for lock in _owned.values():
        lock.forget()
    _owned.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


@contextmanager
def owned(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Own an existing folder; within, and between nested uses in one process, nobody else does.

    Raises:
        FolderInUse: another process owns it.
        CheckpointError: the lock cannot be written; or, at either end, what was locked is no longer there.
    """
    key = Path(folder).resolve()
    lock = _owned.get(key)
    if lock is None:
        try:
            lock = _owned[key] = _Lock(key)
        except FolderInUse:
            raise
        except OSError as error:
            raise CheckpointError(f"output: cannot lock {str(folder)!r}: {error.strerror}") from error
    else:
        lock.check()
        lock.users += 1
    try:
        yield
        lock.check()
    finally:
        lock.users -= 1
        if not lock.users and _owned.pop(key, None) is not None:
            lock.release()


def check_owned(folder: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if a folder that this process owns was deleted meanwhile."""
    lock = _owned.get(Path(folder).resolve())
    if lock is not None:
        lock.check()


def _lock(file: int) -> bool | None:
    """Whether this process has the kernel's lock on ``file`` now; None where there are no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _owner(file: int) -> dict[str, Any]:
    try:
        os.lseek(file, 0, os.SEEK_SET)
        owner = json.loads(os.read(file, 4096))
    except ValueError:
        return {}  # it is being written, or its writer was killed
    return owner if isinstance(owner, dict) else {}


def _machine() -> str:
    """The same for all processes under one kernel, containers among them, until it is started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


# What is in it


def check_output(
    output: Path, *, resume: bool | str = False, overwrite: bool = False, marker: str = RUN_FILE
) -> str | None:
    """The checkpoint to go on from, None to start.

    Args:
        output: where a command is to write.
        resume: False; True: there must be one; "auto": if there is one.
        overwrite: whether results of the same command may be there.
        marker: the file that tells them from anything else.

    Raises:
        ValueError: the folder may not be written to, or there is nothing to resume.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: expected a folder, got the file {str(output)!r}")
    used, is_run = is_used(output), (output / marker).is_file()
    if resume:
        checkpoint = get_last_checkpoint(str(output)) if is_run else None
        if checkpoint is not None:
            return checkpoint
        if resume != "auto":
            raise ValueError(f"output: expected a run with a checkpoint to resume, got {str(output)!r} without one")
    if used and (overwrite or resume) and not is_run:
        raise ValueError(f"output: {str(output)!r} holds files but no {marker}: not a run of this command, not deleted")
    if used and not (overwrite or resume):
        hint = "--resume or --overwrite it" if marker == RUN_FILE else "--overwrite it"
        raise ValueError(f"output: {str(output)!r} is not empty; {hint if is_run else 'choose another folder'}")
    return None


@contextmanager
def left_as_it_was(folder: Path) -> Iterator[None]:
    """A folder that is made within, and is still empty when an error comes, is taken away again."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):
                folder.rmdir()
        raise


def is_used(folder: Path) -> bool:
    """Whether the folder holds anything but what a start that was interrupted at once leaves."""
    return folder.is_dir() and any(path.name not in (LOCK_FILE, RUN_FILE + ".tmp") for path in folder.iterdir())


def delete_run(folder: Path) -> None:
    """Delete what `ebft-train train` wrote to ``folder``, and nothing else."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not _WRITTEN.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_nothing_inside(folder: Path, inputs: Mapping[str, Iterable[str | os.PathLike[str] | None]]) -> None:
    """Raise ValueError if one of ``inputs`` (option -> paths or other names) lies in a folder that is to be emptied."""
    whole = folder.resolve()
    inside = [
        f"{option} {str(name)!r}"
        for option, names in inputs.items()
        for name in names
        if name is not None and Path(name).exists() and Path(name).resolve().is_relative_to(whole)
    ]
    if inside:
        raise ValueError(
            f"output: expected no input of the run inside {str(folder)!r}, which --overwrite would empty, got "
            f"{', '.join(inside)}; nothing was deleted"
        )


# What the run was started with


def fingerprint(files: Sequence[Path]) -> str:
    """Number, size and a digest of files: of all they hold up to `WHOLE` bytes, of more a sample of it.

    A sample has every file's size and `WHOLE` / `BLOCK` blocks that stand at equal distances over all files put one
    after the other, the first and the last among them.
    """
    sizes = [path.stat().st_size for path in files]
    total = sum(sizes)
    digest = hashlib.blake2b(repr(sizes).encode(), digest_size=16)
    count = min(-(-total // BLOCK), WHOLE // BLOCK)
    starts = [number * (total - BLOCK) // max(count - 1, 1) for number in range(count)] if total > WHOLE else None
    before = 0
    for path, size in zip(files, sizes, strict=True):
        with path.open("rb") as file:
            if starts is None:
                while block := file.read(BLOCK):
                    digest.update(block)
            else:
                for start in (x - before for x in starts if before - BLOCK < x < before + size):
                    file.seek(max(start, 0))
                    digest.update(file.read(start + BLOCK - max(start, 0)))
        before += size
    return f"{len(files)} files, {total} bytes, blake2b {digest.hexdigest()}"


def model_files(name: str) -> list[Path]:
    """What a model is loaded from; nothing for a model on the hub."""
    return sorted(path for path in Path(name).glob("*") if path.suffix in _MODEL_FILES and path.is_file())


def check_same_run(folder: Path, run: Mapping[str, Any], *, allowed: bool = False) -> list[str]:
    """Compare what a run is to go on with with what `RUN_FILE` says that it was started with.

    Args:
        folder: of the run.
        run: what it would write there.
        allowed: whether differences are only returned.

    Raises:
        ValueError: something differs, and what; or there is no such record that can be read.
    """
    found = read_json_object(folder / RUN_FILE)
    recorded, got = (_compared(x) for x in (found, json.loads(json.dumps(run))))
    differences = [
        f"{name}: to resume expected what the run was started with, {_shown(recorded, name)}; got {_shown(got, name)}"
        for name in dict.fromkeys([*recorded, *got])
        if recorded.get(name, ...) != got.get(name, ...)
    ]
    if differences and not allowed:
        raise ValueError("; ".join(differences) + " (--allow-changes goes on all the same)")
    return differences


def _compared(run: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that must stay as it is, by option."""
    parts = ("model", "data", "contents", "options", "rows", "training", "seeds", "lora", "processes")
    kept = {part: run[part] for part in parts if part in run}
    if isinstance(kept.get("training"), dict):
        kept["training"] = {name: value for name, value in kept["training"].items() if name not in MAY_CHANGE}
    return flat(kept)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "nothing"
