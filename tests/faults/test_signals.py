"""Asked to stop, a run stores its state and ends; the same command goes on, and nothing is computed twice."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import jobs
from tests.faults.jobs import Job
from utils.training import snapshot

pytestmark = pytest.mark.distributed

USR1 = ("--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
NEVER = ("--run.checkpoint_minutes=none", "--run.checkpoint_epochs=none")
"""Nothing is stored but what the stop itself stores."""


def launcher(job: Job) -> list[int]:
    return [job.agent.pid]


def all_of_them(job: Job) -> list[int]:
    return job.processes()


def workers(job: Job) -> list[int]:
    return list(job.workers().values())


def last_rank(job: Job) -> list[int]:
    return [job.workers()[job.ranks - 1]]


Way = tuple[str, Callable[[Job], list[int]]]


def amid_training(output: str) -> bool:
    """Whether an epoch is done that was not its level's last."""
    epochs = re.findall(r"^ +(\d)/4 ", output, re.MULTILINE)
    return epochs and epochs[-1] != "4"


def stop(job: Job, name: str, whom: Callable[[Job], list[int]]) -> str:
    """Signal a run, see that it ends as it should; returns where it will go on, as it says."""
    try:
        job.wait_for(amid_training)
        time.sleep(0.3)
        job.signal(signal.Signals[name], *whom(job))
        assert job.wait(60.0) == 1  # torchrun's own code, whatever its workers' were
        job.gone(5.0)
    finally:
        job.end()
    status = json.loads(job.run.status.read_text())
    assert status["state"] == "preempted", job.output[-3000:]
    told = rf"stopped by {name}; the same command goes on from (level \d epoch \d+ step \d+)"
    where = re.fullmatch(told, status["reason"])
    assert where, status
    assert job.output.count(f"sieve: {status['reason']}\n") == 1
    assert not job.traceback, job.output
    return where[1]


def stopped_again_and_again(root: Path, ways: tuple[Way, ...]) -> Job:
    """Stop a run in each of the ways, then let it finish."""
    position = ""
    for name, whom in ways:
        job = Job(root, 2, *NEVER, launcher=USR1)
        before, position = position, stop(job, name, whom)
        assert not before or f"resumed {before}\n" in job.output
        level, step = (int(re.findall(rf"{word} (\d+)", position)[0]) for word in ("level", "step"))
        assert snapshot.read(job.run.level(level).checkpoint).facts["step"] == step
    job = Job(root, 2, *NEVER)
    assert f"resumed {position}\n" in job.finish()
    return job


def test_a_stop_loses_nothing(tmp_path: Path, whole: dict[str, Any]) -> None:
    job = stopped_again_and_again(tmp_path / "stopped", (("SIGTERM", launcher), ("SIGUSR1", last_rank)))
    assert jobs.differences(jobs.everything(job.run), whole) == []


@pytest.mark.slow
def test_every_way_to_ask_for_a_stop(tmp_path: Path, whole: dict[str, Any]) -> None:
    ways = (("SIGUSR1", launcher), ("SIGTERM", all_of_them), ("SIGUSR1", workers), ("SIGTERM", last_rank))
    job = stopped_again_and_again(tmp_path / "stopped", ways)
    assert jobs.differences(jobs.everything(job.run), whole) == []


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_at_once_whatever_it_waits_for(tmp_path: Path) -> None:
    job = Job(tmp_path / "runs", 2)
    try:
        job.wait_for("1/4")
        ranks = job.workers()
        os.kill(ranks[1], signal.SIGSTOP)  # from here rank 0 waits in a collective for ever
        time.sleep(1.0)
        os.kill(ranks[0], signal.SIGTERM)
        time.sleep(3.0)
        assert ranks[0] in job.processes()
        os.kill(ranks[0], signal.SIGTERM)
        begin = time.monotonic()
        while ranks[0] in job.processes():
            assert time.monotonic() - begin < 2.0
            time.sleep(0.02)
        os.kill(ranks[1], signal.SIGCONT)
        assert job.wait() == 1
        job.gone(5.0)
    finally:
        job.end()
