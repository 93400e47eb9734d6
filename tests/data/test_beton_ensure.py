"""Making .beton files where they are missing: sources, locks, several processes, the command."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tests.data.beton_cases import CLASS_NAMES, Pictures, spec_of
from utils import params
from utils.data import beton
from utils.data.resolve import resolve
from utils.data.spec import DataSpec
from utils.system.errors import UserError


def picture_folders(root: Path, per_class: int = 8, seed: int = 0, classes: list[str] = CLASS_NAMES) -> None:
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(per_class):
                pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


def test_ensure_writes_what_is_missing_and_keeps_the_rest(tmp_path):
    spec = spec_of(tmp_path)
    picture_folders(spec.directory)
    paths = beton.ensure(spec, 1, download=False)
    assert {split: len(beton.labels(path)) for split, path in paths.items()} == {"train": 24, "test": 24}
    stamps = {path: path.stat().st_mtime_ns for path in paths.values()}
    paths["test"].unlink()
    assert beton.ensure(spec, 1, download=False) == paths
    assert paths["train"].stat().st_mtime_ns == stamps[paths["train"]]
    assert paths["test"].is_file()
    paths["train"].write_bytes(paths["train"].read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{paths['train'].name}.*truncated"):
        beton.ensure(spec, 1, download=False)
    beton.ensure(spec, 1, download=False, force=True)
    beton.check(paths["train"], spec, "train", verify=True)


def test_ensure_names_the_missing_source(tmp_path):
    spec = spec_of(tmp_path)
    with pytest.raises(UserError, match=str(spec.directory)):
        beton.ensure(spec, 1, download=False)


def test_files_of_another_folder_are_refused_and_a_moved_folder_is_not(tmp_path):
    spec = spec_of(tmp_path)
    picture_folders(spec.directory)
    beton.ensure(spec, 1, download=False)
    moved = tmp_path / "moved"
    spec.directory.rename(moved)
    beton.ensure(resolve(params.Data(**{**vars(spec.data), "root": str(moved)})), 1, download=False)
    picture_folders(spec.directory, per_class=9)
    (tmp_path / "third").mkdir()
    picture_folders(tmp_path / "third", per_class=5)
    with pytest.raises(UserError, match=r"written from .*set, not from .*third"):
        beton.ensure(resolve(params.Data(**{**vars(spec.data), "root": str(tmp_path / "third")})), 1, download=False)


def rename_a_class(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "ant").rename(root / split / "ape")


def add_an_image(root: Path) -> None:
    Image.new("RGB", (20, 20)).save(root / "train" / "bee" / "new.png")


@pytest.mark.parametrize("change", [rename_a_class, add_an_image])
def test_files_whose_source_has_changed_are_refused(tmp_path, change):
    spec = spec_of(tmp_path)
    picture_folders(spec.directory)
    paths = beton.ensure(spec, 1, download=False)
    change(spec.directory)
    with pytest.raises(UserError, match=r"stale.*delete it to have it written again") as caught:
        beton.ensure(spec, 1, download=False)
    assert str(paths["train"]) in str(caught.value)
    assert "\n" not in str(caught.value)
    beton.ensure(spec, 1, download=False, compare=False)
    for path in paths.values():  # the mend it names
        path.unlink()
    assert len(beton.labels(beton.ensure(spec, 1, download=False)["train"])) == (25 if change is add_an_image else 24)


@pytest.mark.parametrize(("name", "place"), [("cifar10", "cifar10"), ("imagenette", "imagenette/imagenette2-320")])
def test_class_folders_of_a_named_data_set_are_compared_too(tmp_path, name, place):
    spec = resolve(params.Data(name=name, root=str(tmp_path)))
    classes = [f"n{label:02}" for label in range(10)]
    picture_folders(tmp_path / place, 1, classes=classes)
    paths = beton.ensure(spec, 1, download=False)
    picture_folders(tmp_path / place, 2, classes=classes)
    with pytest.raises(UserError, match=f"{paths['train'].name}: stale"):
        beton.ensure(spec, 1, download=False)


def test_files_whose_source_is_gone_are_used(tmp_path):
    spec = spec_of(tmp_path)
    picture_folders(spec.directory)
    paths = beton.ensure(spec, 1, download=False)
    for image in spec.directory.rglob("*.png"):  # class folders left empty say nothing
        image.unlink()
    assert beton.ensure(spec, 1, download=False) == paths
    shutil.rmtree(spec.directory)
    assert beton.ensure(spec, 1, download=False) == paths


def test_a_source_that_has_become_contradictory_is_refused(tmp_path):
    spec = spec_of(tmp_path)
    picture_folders(spec.directory)
    beton.ensure(spec, 1, download=False)
    (spec.directory / "train" / "ant").rename(spec.directory / "train" / "ape")
    with pytest.raises(UserError, match="differ in classes"):
        beton.ensure(spec, 1, download=False)


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("name", ["imagenet", "imagewoof", "cifar10"])
def test_missing_data_leaves_nothing_behind(tmp_path, name):
    with pytest.raises(UserError, match=r"data\.root"):
        beton.ensure(resolve(params.Data(name=name, root=str(tmp_path))), 1, download=False)
    assert everything(tmp_path) == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_class_leaves_nothing_behind(tmp_path, split):
    spec = spec_of(tmp_path)
    picture_folders(spec.directory)
    for image in (spec.directory / split / "bee").iterdir():
        image.unlink()
    before = everything(tmp_path)
    with pytest.raises(UserError, match=f"{split}/bee holds no images"):
        beton.ensure(spec, 1, download=False)
    assert everything(tmp_path) == before


def test_a_corrupt_image_leaves_nothing_behind(tmp_path):
    spec = dataclasses.replace(spec_of(tmp_path), betons=tmp_path / "a" / "b")
    picture_folders(spec.directory)
    (spec.directory / "train" / "bee" / "3.png").write_bytes(b"no image")
    before = everything(tmp_path)
    with pytest.raises(UserError, match=r"bee/3\.png"):
        beton.ensure(spec, 2, download=False)
    assert everything(tmp_path) == before


def _ensure_refused(spec: DataSpec, start, box) -> None:
    start.wait()
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        try:
            beton.ensure(spec, 1, download=False)
        except UserError as error:
            box.put(str(error))


def test_processes_that_wait_for_a_writer_that_fails_see_the_same_error(tmp_path):
    spec = spec_of(tmp_path)
    picture_folders(spec.directory)
    (spec.directory / "train" / "cat" / "7.png").write_bytes(b"no image")
    context = multiprocessing.get_context("fork")
    start, box = context.Event(), context.Queue()
    workers = [context.Process(target=_ensure_refused, args=(spec, start, box)) for _ in range(3)]
    for worker in workers:
        worker.start()
    start.set()
    told = [box.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert all("cat/7.png" in text for text in told), told
    assert not list(tmp_path.rglob("*.beton")) + list(tmp_path.rglob("*.lock"))


def _ensure_and_tell(spec: DataSpec, start, box) -> None:
    start.wait()
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
        wrote: list[str] = []
        original = beton.write
        beton.write = lambda source, path, *rest: (
            wrote.append(path.name.split("-")[1]),
            time.sleep(0.3),
            original(source, path, *rest),
        )[-1]
        paths = beton.ensure(spec, 1, download=False)
        digests = [beton.check(path, spec, split)["digest"] for split, path in paths.items()]
    box.put((wrote, digests))


def test_processes_that_ensure_at_once_write_each_file_once(tmp_path):
    spec = spec_of(tmp_path)
    picture_folders(spec.directory)
    context = multiprocessing.get_context("fork")
    start, box = context.Event(), context.Queue()
    workers = [context.Process(target=_ensure_and_tell, args=(spec, start, box)) for _ in range(3)]
    for worker in workers:
        worker.start()
    start.set()
    told = [box.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(split for wrote, _ in told for split in wrote) == ["test", "train"]
    assert told[0][1] == told[1][1] == told[2][1]
    assert not list(spec.betons.glob("*.tmp")) + list(spec.betons.glob(".*.tmp"))


def _ensure_slowly(spec: DataSpec, reached) -> None:
    def open_slowly(name: str, folder: Path, split: str, download: bool = False) -> Pictures:
        def act() -> None:
            reached.put(os.getpid())
            time.sleep(600)

        return Pictures(bad={130: act})

    beton.open_split = open_slowly
    beton.ensure(spec, 2, download=False)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_writer_leaves_no_lock_no_rest_and_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(beton, "allowed_cpus", lambda: 2)
    spec = spec_of(tmp_path)
    picture_folders(spec.directory)
    context = multiprocessing.get_context("fork")
    reached = context.Queue()
    victim = context.Process(target=_ensure_slowly, args=(spec, reached))
    victim.start()
    worker = reached.get(timeout=60)
    assert worker != victim.pid
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(60)
    assert len(list(spec.betons.glob(".*.tmp"))) == 1
    paths = beton.ensure(spec, 1, download=False)
    assert len(beton.labels(paths["train"])) == 24
    assert not list(spec.betons.glob(".*.tmp"))
    until = time.monotonic() + 20
    while _is_running(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _is_running(worker)


def test_a_folder_that_cannot_be_written_is_used_when_the_files_are_there(tmp_path, monkeypatch):
    spec = spec_of(tmp_path)
    picture_folders(spec.directory)
    paths = beton.ensure(spec, 1, download=False)
    for path in paths.values():
        beton.sidecar_of(path).unlink()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert beton.ensure(spec, 1, download=False) == paths
    paths["test"].unlink()
    with pytest.raises(UserError, match=r"cannot write there.*data\.betons"):
        beton.ensure(spec, 1, download=False)


def test_the_command_writes_once_and_reports_every_file(tmp_path, capsys):
    words = ["--data.name=digits", f"--data.root={tmp_path}", "--data.workers=1"]
    command = [sys.executable, "-m", "utils.data.beton", *words]
    first = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert len(lines) == 2
    for line, count in zip(lines, (1438, 359), strict=True):
        path = Path(line.split(": ")[0])
        assert len(beton.labels(path)) == count
        assert f"{count} samples, 10 classes" in line
    stamp = path.stat().st_mtime_ns
    beton.main(words)
    assert [line.rsplit(",", 1)[0] for line in capsys.readouterr().out.splitlines()] == [
        line.rsplit(",", 1)[0] for line in lines
    ]
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(path.read_bytes()[:-3])
    for more, said in (([], f"{path}: truncated"), (["--force=perhaps"], "--force: true or false")):
        with pytest.raises(SystemExit) as ended:
            beton.main([*words, *more])
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith(f"sieve: {said}")
        assert told.count("\n") == 1
    beton.main([*words, "--force=true"])
    assert path.stat().st_mtime_ns > stamp
