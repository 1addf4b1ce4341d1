"""One process per folder, what may be deleted of it, and whether what is resumed is the run that was started."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from ebft_trainer import run_folder
from ebft_trainer.checkpoint import CheckpointError
from ebft_trainer.run_folder import (
    LOCK_FILE,
    FolderInUse,
    check_nothing_inside,
    check_owned,
    check_same_run,
    delete_run,
    fingerprint,
    is_used,
    owned,
)


def in_child(work) -> int:
    """0 if ``work`` ends well in a forked process, 1 if it raises FolderInUse."""
    child = os.fork()
    if not child:
        try:
            work()
        except FolderInUse:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def take(folder: Path) -> None:
    with owned(folder):
        pass


def test_one_process_owns_a_folder(tmp_path):
    with owned(tmp_path):
        assert in_child(lambda: take(tmp_path)) == 1
        with owned(tmp_path / "." / "x" / ".."):  # the same folder, in the same process
            pass
        assert in_child(lambda: take(tmp_path)) == 1
        owner = json.loads((tmp_path / LOCK_FILE).read_text())
        assert owner["process"] == os.getpid() and owner["host"]
    assert not list(tmp_path.iterdir())
    assert in_child(lambda: take(tmp_path)) == 0


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path):
    """At once, also while a process that it started lives on."""
    reader, writer = os.pipe()

    def hold() -> None:
        with owned(tmp_path):
            if os.fork():
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(writer, f"{os.getpid()}".encode())
            time.sleep(60)

    assert in_child(hold) == -signal.SIGKILL
    grandchild = int(os.read(reader, 20))
    assert (tmp_path / LOCK_FILE).exists()
    take(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()
    os.kill(grandchild, signal.SIGKILL)


@pytest.mark.parametrize("kernel_locks", [True, None])
def test_on_another_machine_a_sign_of_life_decides(tmp_path, monkeypatch, kernel_locks):
    """The kernel's lock may not be known there: this process gets it, or there are none."""
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"process": 7, "host": "elsewhere", "machine": "another"}))
    if kernel_locks is None:
        monkeypatch.setattr(run_folder, "_lock", lambda _file: None)
    with pytest.raises(FolderInUse, match="is in use by process 7 on host elsewhere since .*sign of life [0-9] s ago"):
        take(tmp_path)
    assert path.exists()
    long_ago = time.time() - run_folder.DEAD_AFTER - 5
    os.utime(path, (long_ago, long_ago))
    take(tmp_path)
    assert not path.exists()


def test_an_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SIGN_OF_LIFE", 0.01)
    with owned(tmp_path):
        os.utime(tmp_path / LOCK_FILE, (0, 0))
        deadline = time.monotonic() + 30
        while not (tmp_path / LOCK_FILE).stat().st_mtime and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK_FILE).stat().st_mtime > 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": 1'])
def test_a_lock_that_was_not_written_to_its_end_is_nobodys(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    assert not is_used(tmp_path)
    take(tmp_path)


def test_what_is_deleted_is_noticed(tmp_path):
    check_owned(tmp_path)  # owned by nobody
    with (
        pytest.raises(CheckpointError, match=f"or {LOCK_FILE} in it was deleted while the run was going on"),
        owned(tmp_path),
    ):
        (tmp_path / LOCK_FILE).unlink()
        with pytest.raises(CheckpointError, match="was deleted"):
            check_owned(tmp_path)
        (tmp_path / LOCK_FILE).write_text("another's")
    assert (tmp_path / LOCK_FILE).read_text() == "another's"
    with pytest.raises(CheckpointError, match="output: cannot lock '.*nowhere': No such file or directory"):
        take(tmp_path / "nowhere")


def test_only_what_a_run_wrote_is_deleted(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in ("checkpoint-12", "model", "_unfinished/model", "checkpoint-best", "data"):
        (run / folder).mkdir(parents=True)
        (run / folder / "file").touch()
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (run / "checkpoint-3").symlink_to(elsewhere)
    for name in ("ebft.json", "log.jsonl", "log.jsonl.tmp", "results.json", "results.json.old", "notes.txt"):
        (run / name).touch()
    delete_run(run)
    left = ["checkpoint-best", "data", "notes.txt", "results.json.old"]
    assert sorted(path.name for path in run.iterdir()) == left and (elsewhere / "precious").exists()
    delete_run(tmp_path / "nowhere")


def test_inputs_inside_a_folder_that_is_to_be_emptied_are_named(tmp_path):
    run = tmp_path / "run"
    (run / "texts").mkdir(parents=True)
    (tmp_path / "outside").touch()
    (tmp_path / "link").symlink_to(run / "texts")
    check_nothing_inside(run, {"--data": [tmp_path / "outside", "hub:name"], "--model": ["name/on-hub", None]})
    with pytest.raises(
        ValueError, match="output: expected no input .* got --data '.*texts', --model '.*link'; nothing"
    ):
        check_nothing_inside(run, {"--data": [run / "texts", tmp_path / "outside"], "--model": [tmp_path / "link"]})


def test_a_fingerprint_is_of_contents_and_cheap_for_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "WHOLE", 256)
    monkeypatch.setattr(run_folder, "BLOCK", 16)
    paths = [tmp_path / name for name in "abc"]
    sizes = (40, 0, 100)
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(bytes(range(size)))
    small = fingerprint(paths)
    assert small.startswith("3 files, 140 bytes, blake2b ") and fingerprint(paths) == small
    os.utime(paths[0], (0, 0))
    assert fingerprint(paths) == small
    paths[2].write_bytes(bytes(99) + b"x")
    assert fingerprint(paths) != small
    # 16 blocks of 16 bytes of 2000: the first, the last and some between are read, across the files' edges.
    content = bytes(range(250)) * 8
    cuts = (0, 7, 300, 1990, 2000)
    paths = [tmp_path / f"part{number}" for number in range(4)]

    def write(data: bytes) -> str:
        for path, start, end in zip(paths, cuts, cuts[1:], strict=False):
            path.write_bytes(data[start:end])
        return fingerprint(paths)

    whole = write(content)
    seen = [write(content[:at] + b"\xff" + content[at + 1 :]) != whole for at in range(2000)]
    starts = [number * 1984 // 15 for number in range(16)]
    assert seen == [any(start <= at < start + 16 for start in starts) for at in range(2000)]


RUN = {
    "model": "m",
    "options": {"horizon": 8},
    "training": {"learning_rate": 0.1, "max_steps": 5},
    "contents": {"data": {"a.txt": "1 files, 3 bytes, blake2b 0"}},
}


def test_what_differs_from_the_run_that_is_resumed_is_named(tmp_path):
    (tmp_path / "ebft.json").write_text(json.dumps(RUN | {"versions": {"torch": "1"}}))
    assert check_same_run(tmp_path, RUN) == []
    assert check_same_run(tmp_path, RUN | {"training": {"learning_rate": 0.1, "max_steps": 9}}) == []
    other = RUN | {"training": {"learning_rate": 0.2}, "lora": {"rank": 2}}
    with pytest.raises(ValueError) as raised:
        check_same_run(tmp_path, other)
    assert str(raised.value) == (
        "training.learning_rate: to resume expected what the run was started with, 0.1; got 0.2; lora.rank: to resume "
        "expected what the run was started with, nothing; got 2 (--allow-changes goes on all the same)"
    )
    assert len(check_same_run(tmp_path, other, allowed=True)) == 2


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("", "'': Expecting value"),
        ("[]", "list"),
        ("[" * 100_000, "'\\[.*: too deeply nested"),
        ('{"a": ' + "1" * 5000 + "}", ".*4300 digits"),
    ],
)
def test_a_record_that_is_broken_is_one_line(tmp_path, content, got):
    (tmp_path / "ebft.json").write_text(content)
    with pytest.raises(ValueError, match=f"ebft.json: expected a JSON object, got {got}") as raised:
        check_same_run(tmp_path, RUN)
    assert "\n" not in str(raised.value)
    (tmp_path / "ebft.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="ebft.json: expected a JSON object, got .*utf-8"):
        check_same_run(tmp_path, RUN)
