"""Two hosts, one torchrun each: the run of one host, and the loss of either."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import jobs, namespaces
from tests.faults.jobs import Job
from tests.faults.namespaces import Host

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TIMEOUT = 15.0
"""distributed.timeout: seconds a collective waits for a host that says nothing."""

GRACE = 30.0
"""What starting and ending, and torchrun's own last words, may take beyond that."""


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with namespaces.hosts() as pair:
        yield pair


def start(hosts: tuple[Host, Host], folder: Path) -> tuple[Job, Job]:
    """The same command on both, writing to the same folder, which each host calls by a name of its own."""
    first, found = hosts[0], []
    for number, host in enumerate(hosts):
        rendezvous = (
            "--nnodes=2",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={first.address}:29533",
            "--rdzv-id=test",
            f"--rdzv-conf=is_host={int(number == 0)},read_timeout=5",
            f"--local-addr={host.address}",
        )
        root = folder / "runs" if number == 0 else folder / "runs" / ".." / "runs"
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        found.append(
            Job(
                root,
                1,
                f"--distributed.timeout={TIMEOUT}",
                launcher=rendezvous,
                prefix=host.prefix,
                environment=host.environment,
                base=tuple(key for key in jobs.FULL if "distributed.timeout" not in key),
                log=folder / f"host_{number}.log",
            )
        )
    return found[0], found[1]


def test_two_hosts_give_the_run_of_one(tmp_path: Path, hosts: tuple[Host, Host], whole: dict[str, Any]) -> None:
    pair = start(hosts, tmp_path)
    try:
        for job in pair:
            job.finish()
    finally:
        for job in pair:
            job.end()
    assert jobs.differences(jobs.everything(pair[0].run), whole) == []


@pytest.mark.parametrize("lost", [1, 0], ids=["the second", "the first, which holds the rendezvous"])
def test_a_host_that_vanishes_ends_the_run_and_the_same_commands_finish_it(
    tmp_path: Path, hosts: tuple[Host, Host], whole: dict[str, Any], lost: int
) -> None:
    pair = start(hosts, tmp_path)
    try:
        pair[0].wait_for(" 2/4")
        time.sleep(0.5)
        hosts[lost].cable("down")  # first, so that no last packet tells of the end
        pair[lost].signal(signal.SIGKILL, *pair[lost].processes())
        begin = time.monotonic()
        left = pair[1 - lost]
        assert left.wait(TIMEOUT + GRACE) != 0
        print(f"host {1 - lost} ended {time.monotonic() - begin:.1f} s after the other had vanished")
        left.gone(10.0)
        assert not left.traceback, left.output
        status = json.loads(left.run.status.read_text())
        assert status["state"] == "failed"
        assert f"rank {1 - lost} lost another rank (Timed out waiting" in status["reason"]
        hosts[lost].cable("up")
        pair = start(hosts, tmp_path)
        for job in pair:
            job.finish()
    finally:
        for job in pair:
            job.end()
    assert "resumed level" in pair[0].output
    assert jobs.differences(jobs.everything(pair[0].run), whole) == []
