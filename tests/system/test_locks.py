"""Locks of levels: one owner at a time, named to others; a dead owner is succeeded, by one process only."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.system import locks
from utils.system.errors import Busy
from utils.system.locks import Lock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "level_01"


def lock(folder: Path) -> Lock:
    return Lock(folder, "level 1")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def owned_by(folder: Path, number: int = 1, age: float = 0.0, **changes: object) -> Path:
    """A lock of another process, as it would have left it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"lock.{number}.json"
    path.write_text(json.dumps({**locks._identity("other"), **changes}))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def gone() -> dict[str, object]:
    """A process of this host that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = locks._started(child.pid)
    assert started is not None
    child.communicate(b"\n")
    return {"pid": child.pid, "started": started}


def test_one_owner_at_a_time_and_the_other_is_told_whom(folder: Path) -> None:
    first = lock(folder)
    assert first.acquire() is None
    with pytest.raises(Busy, match=rf"level 1: process {os.getpid()} on {socket.gethostname()}.* heartbeat 0 s ago"):
        lock(folder).acquire()
    first.check()
    first.release()
    assert files(folder) == []
    second = lock(folder)
    second.acquire()
    second.release()


def test_it_is_released_by_an_error_too(folder: Path) -> None:
    def broken() -> None:
        with lock(folder).held():
            assert files(folder) == ["lock.1.json"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert files(folder) == []


def test_a_process_of_this_host_that_is_gone_is_succeeded_at_once(folder: Path) -> None:
    path = owned_by(folder, **gone())
    own = lock(folder)
    assert f"process {json.loads(path.read_text())['pid']}" in str(own.acquire())
    assert files(folder) == ["lock.2.json"]
    own.release()


def test_a_process_number_given_out_again_is_not_the_owner(folder: Path) -> None:
    owned_by(folder, pid=os.getpid(), started=1)
    own = lock(folder)
    assert own.acquire() is not None
    own.release()


@pytest.mark.parametrize(("age", "taken"), [(0.0, False), (100.0, False), (121.0, True), (1e6, True)])
def test_an_owner_elsewhere_is_dead_after_two_minutes_without_a_heartbeat(
    folder: Path, age: float, taken: bool
) -> None:
    owned_by(folder, age=age, boot="another", host="node7", job="4711_3")
    own = lock(folder)
    if not taken:
        with pytest.raises(Busy, match=r"process \d+ on node7, job 4711_3, heartbeat"):
            own.acquire()
        assert files(folder) == ["lock.1.json"]
    else:
        assert "node7" in str(own.acquire())
        own.release()


def test_a_container_of_this_host_is_judged_by_its_heartbeat(folder: Path) -> None:
    # The same machine, but process numbers of its own: this pid says nothing.
    owned_by(folder, pids="pid:[1]", **gone())
    with pytest.raises(Busy):
        lock(folder).acquire()


@pytest.mark.parametrize(
    ("own", "other", "taken"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, {"job": "7", "job_start": "0"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, {"job": "7", "job_start": "1"}, False),
        ({"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, {"job": "7", "job_start": "0"}, False),
        ({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "2"}, {"launch": "a", "launch_start": "1"}, True),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}, {"launch": "none"}, False),
    ],
)
def test_an_earlier_start_of_the_same_job_elsewhere_is_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, str], other: dict[str, str], taken: bool
) -> None:
    owned_by(folder, boot="another", host="node7", **other)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    mine = lock(folder)
    if taken:
        mine.acquire()
        mine.release()
    else:
        with pytest.raises(Busy):
            mine.acquire()


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"pid": "x", "started": []}', "\x00\xff"])
def test_a_file_that_is_no_lock_counts_while_it_is_young(folder: Path, content: str) -> None:
    path = owned_by(folder)
    path.write_text(content)
    with pytest.raises(Busy):
        lock(folder).acquire()
    os.utime(path, (time.time() - 130, time.time() - 130))
    own = lock(folder)
    own.acquire()
    own.release()


def test_who_was_succeeded_writes_nothing_more(folder: Path) -> None:
    first = lock(folder)
    first.acquire()
    owned_by(folder, number=2, host="node8")
    with pytest.raises(Busy, match=r"level 1: lost to process .* on node8"):
        first.check()


def test_the_heartbeat_touches_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.02)
    with lock(folder).held():
        path = folder / "lock.1.json"
        os.utime(path, (1.0, 1.0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < 2.0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _contend(folder: Path, start: object, results: object) -> None:
    own = Lock(folder, "level 1")
    start.wait()  # type: ignore[attr-defined]
    try:
        own.acquire()
        results.put(os.getpid())  # type: ignore[attr-defined]
        time.sleep(0.5)  # longer than the others take to try
        own.check()
        own.release()
    except Busy:
        results.put(None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stale", [False, True])
def test_never_two_owners_however_many_try_at_once(folder: Path, stale: bool) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        if stale:
            owned_by(folder, **gone())
        start, results = context.Event(), context.Queue()
        contenders = [context.Process(target=_contend, args=(folder, start, results)) for _ in range(6)]
        for each in contenders:
            each.start()
        start.set()
        owners = [owner for _ in contenders if (owner := results.get(timeout=30)) is not None]
        for each in contenders:
            each.join(timeout=30)
            assert each.exitcode == 0
        assert len(owners) <= 1
        for left in folder.glob("lock.*"):
            left.unlink()
