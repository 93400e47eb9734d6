"""Disks that are full or read-only, images that vanish, losses that are no numbers: one clear line, nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.faults import jobs
from tests.faults.jobs import Job

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a file system of its own needs root and mount")
    try:
        mount("-t", "tmpfs", "-o", "size=24m", "sieve-test", str(place))
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def ended_in_one_line(job: Job, pattern: str) -> str:
    """Wait for an end with an error; returns the only line of ours, which matches the pattern."""
    try:
        assert job.wait(120.0) != 0
        job.gone(10.0)
    finally:
        job.end()
    told = re.findall(r"^.*sieve: .*$", job.output, re.MULTILINE)
    assert len(told) == 1, job.output
    assert re.search(pattern, told[0]), told[0]
    assert not job.traceback, job.output
    return told[0]


def fill(disk: Path) -> Path:
    """Leave no byte free."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as handle:
        while True:
            handle.write(bytes(4096))
    return filler


def test_a_full_then_a_read_only_disk(tmp_path: Path, disk: Path, whole: dict[str, Any]) -> None:
    root, log = disk / "runs", tmp_path / "log"
    job = Job(root, 2, log=log)
    job.wait_for("level 1: density")
    done = {name: content for name, content in jobs.everything(job.run).items() if name.startswith("level_00")}
    filler = fill(disk)
    full = r"runs/.*: cannot be written \(No space left on device\); free some space and run the same command again"
    ended_in_one_line(job, full)
    ended_in_one_line(Job(root, 2, log=log), full)
    mount("-o", "remount,ro", str(disk))
    again = r"runs/.*: cannot be written \(Read-only file system\); make it writable and run the same command again"
    ended_in_one_line(Job(root, 2, log=log), again)
    mount("-o", "remount,rw", str(disk))
    filler.unlink()
    left = jobs.everything(job.run)
    assert {name: left[name] for name in done} == done
    job = Job(root, 2, log=log)
    job.finish()
    assert jobs.differences(jobs.everything(job.run), whole) == []


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of small images that differ in brightness."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 8)):
        for label in range(3):
            folder = tmp_path / "images" / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(60 * label, 60 * label + 80, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return tmp_path / "images"


def test_an_image_that_vanishes_is_named_and_nothing_is_lost(tmp_path: Path, images: Path) -> None:
    folder = [key for key in jobs.TINY if not key.startswith("--data")] + [
        "--data.name=folder", f"--data.root={images}", "--data.loader=torchvision", "--data.image_size=32",
        "--data.workers=1", "--levels.densities=0.5", "--training.epochs=4", "--run.checkpoint_epochs=1",
    ]  # fmt: skip
    base = tuple(key for key in folder if key != "--levels.densities=0.5,0.2")
    whole = Job(tmp_path / "whole", 2, base=base)
    whole.finish()
    job = Job(tmp_path / "runs", 2, base=base)
    job.wait_for(" 2/4")
    (images / "train" / "class_1").rename(tmp_path / "aside")
    ended_in_one_line(job, r"cannot read image .*/class_1/\d+\.png \(.*No such file.*\); replace or remove it")
    (tmp_path / "aside").rename(images / "train" / "class_1")
    job = Job(tmp_path / "runs", 2, base=base)
    assert "resumed level 0 epoch" in job.finish()
    assert jobs.differences(jobs.everything(job.run), jobs.everything(whole.run)) == []


def test_a_loss_that_is_no_number_names_step_rank_rate_and_what_is_stored(tmp_path: Path) -> None:
    explodes = ("--schedule.name=step", "--schedule.milestones=1ep", "--schedule.gamma=1e30")
    job = Job(tmp_path / "runs", 2, *jobs.TINY, *explodes, "--training.epochs=3", "--run.checkpoint_epochs=1", base=())
    line = ended_in_one_line(
        job,
        r"sieve: level 0, step \d+, rank 0: the loss became nan at learning rate 1e\+29; the last checkpoint is of "
        r"level 0 epoch 1 step 10; lower optimizer\.lr, add schedule\.warmup or training\.clip",
    )
    status = json.loads(job.run.status.read_text())
    assert status == {"state": "failed", "reason": line}
    assert job.run.level(0).checkpoint.exists()


def test_a_killed_rank_is_told_as_lost(tmp_path: Path) -> None:
    job = Job(tmp_path / "runs", 2)
    job.wait_for("1/4")
    os.kill(job.workers()[1], signal.SIGKILL)
    assert job.wait(60.0) == 1
    job.gone(5.0)
    assert not job.traceback, job.output
    status = json.loads(job.run.status.read_text())
    assert status["state"] == "failed"
    assert "rank 0 lost another rank" in status["reason"]
