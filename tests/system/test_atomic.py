"""Files that are whole or absent: what a full disk says, what a killed writer leaves, and who may remove it."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from utils import files
from utils.system import atomic
from utils.system.errors import UserError
from utils.system.locks import Lock


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """What a full disk does, without one: writing beyond `size` bytes fails (Python ignores SIGXFSZ)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_cannot_be_written_whole_is_told_in_one_line_and_the_old_file_stays(tmp_path: Path) -> None:
    place, weights = tmp_path / "row.json", tmp_path / "weights.safetensors"
    atomic.write_json(place, {"old": 1})
    files.save_weights(weights, {"a": torch.ones(3)})
    with files_no_larger_than(10_000):
        with pytest.raises(UserError, match=r"row\.json: cannot be written \(File too large\); raise the limit"):
            atomic.write_text(place, "x" * 20_000)
        with pytest.raises(UserError, match=r"weights\.safetensors: cannot be written \(File too large\); raise"):
            files.save_weights(weights, {"a": torch.ones(20_000)})
    assert names(tmp_path) == ["row.json", "weights.safetensors"]
    assert place.read_text() == '{\n  "old": 1\n}\n'
    assert files.load_weights(weights)["a"].tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "cannot be written (No space left on device); free some space and run the same command again"),
        (errno.EROFS, "cannot be written (Read-only file system); make it writable and run the same command again"),
        (errno.EACCES, "cannot be written (Permission denied); permit writing there and run the same command again"),
        (errno.EIO, "cannot be written (Input/output error); mend that and run the same command again"),
    ],
)
def test_the_mend_fits_the_reason(tmp_path: Path, number: int, told: str) -> None:
    with pytest.raises(UserError) as caught, atomic.replacing(tmp_path / "f"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"{tmp_path / 'f'}: {told}"
    assert names(tmp_path) == []


def test_a_folder_that_is_a_file_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"runs/a/f: cannot be written"):
        atomic.write_text(tmp_path / "runs" / "a" / "f", "")
    with pytest.raises(UserError, match=r"runs/level_00: cannot be written"):
        Lock(tmp_path / "runs" / "level_00", "a level").acquire()


def test_tensor_files_have_the_modes_of_other_files(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "text", "")
    files.save_weights(tmp_path / "w.safetensors", {"a": torch.ones(1)})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names(tmp_path)}
    assert len(modes) == 1


def killed_writer(folder: Path) -> list[str]:
    """What a process leaves that is killed while it writes; all names there are."""
    code = (
        "import os, sys\nfrom utils.system import atomic\n"
        "with atomic.replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(folder / "row.json")], cwd=root)
    assert done.returncode == -9
    return names(folder)


def test_only_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    (left,) = killed_writer(tmp_path)
    own = atomic.temporary_of(tmp_path / "row.json")
    elsewhere = tmp_path / ".row.json.00000000-1-00000000.tmp"
    old = tmp_path / ".row.json.00000000-2-00000000.tmp"
    library, lock = tmp_path / ".tmpAbc123", tmp_path / ".lock.1.json.00000000-3-00000000.tmp"
    kept = [own, elsewhere, library, lock, tmp_path / "row.json", tmp_path / ".hidden.tmp"]
    for path in (*kept, old):
        path.touch()
    os.utime(old, (time.time() - 2 * atomic.OLD,) * 2)
    atomic.sweep(tmp_path)
    assert names(tmp_path) == sorted(path.name for path in kept)
    assert left not in names(tmp_path)
    atomic.sweep(tmp_path, owned=True)  # who owns the folder is its only writer, but others ask for the lock
    assert names(tmp_path) == sorted(path.name for path in (own, lock, tmp_path / "row.json", tmp_path / ".hidden.tmp"))
    atomic.sweep(tmp_path / "absent")


def test_who_takes_a_level_over_clears_up(tmp_path: Path) -> None:
    killed_writer(tmp_path)
    (tmp_path / ".tmpAbc123").touch()
    lock = Lock(tmp_path, "a level")
    lock.acquire()
    assert names(tmp_path) == ["lock.1.json"]
    Lock(tmp_path, "").tidy()
    assert names(tmp_path) == ["lock.1.json"], "the lock of a process that lives"
    lock.release()
    code = (
        "import os, pathlib, sys\nfrom utils.system.locks import Lock\n"
        "Lock(pathlib.Path(sys.argv[1]), '').acquire()\nos.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).resolve().parents[2])
    assert names(tmp_path) == ["lock.1.json"]
    Lock(tmp_path, "").tidy()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "wording", ["I/O error: No space left on device (os error 28)", "IoError(Os { code: 28, kind: X })"]
)
def test_a_full_disk_is_told_whatever_safetensors_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wording: str
) -> None:
    def save_file(*_: object) -> None:
        raise files.SafetensorError(f"Error while serializing: {wording}")

    monkeypatch.setattr(files, "save_file", save_file)
    with pytest.raises(UserError, match=r"w\.safetensors: cannot be written \(No space left on device\); free some"):
        files.save_weights(tmp_path / "w.safetensors", {"a": torch.ones(3)})
    monkeypatch.setattr(
        files, "save_file", lambda *_: (_ for _ in ()).throw(files.SafetensorError("a header too large"))
    )
    with pytest.raises(files.SafetensorError, match="a header too large"):
        files.save_weights(tmp_path / "w.safetensors", {"a": torch.ones(3)})
