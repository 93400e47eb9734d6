"""The templates of configs/slurm on a real SLURM: arrays, chains, several nodes, preemption and the queue again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.levels_cases import TIMES, everything, rows, run
from tests.slurm.cluster import ROOT, Cluster, cluster, missing
from utils.params import Params
from utils.params.load import build
from utils.record import run_dir
from utils.system.rundir import RunDir

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.timeout(600),
]

TINY = {
    "data.name": "digits",
    "data.loader": "device",
    "data.subset": 160,
    "data.val": 0.0,
    "model.name": "cifar/resnet20",
    "training.batch_size": 40,
    "training.precision": "float32",
    "optimizer.lr": 0.05,
    "run.device": "cpu",
    "run.threads": 1,
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as here:
        yield here


def keys(root: Path, **more: object) -> dict[str, object]:
    return {**TINY, "run.root": str(root), **{name.replace("__", "."): value for name, value in more.items()}}


def words(values: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def submit(slurm: Cluster, script: str, values: dict[str, object], *options: str, ranks: int = 1) -> str:
    return slurm.submit(
        *options, f"configs/slurm/{script}", *words(values), SIEVE_ENV=sys.prefix, SIEVE_RANKS=str(ranks)
    )


def until(holds: object, slurm: Cluster, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.1)


def epochs(directory: RunDir, level: int = 0) -> int:
    table = directory.level(level).epochs
    return len(rows(table)) if table.exists() else 0


def in_one_process(root: Path, params: dict[str, object]) -> tuple[Params, RunDir]:
    whole = build({**params, "run.root": str(root)})
    return whole, run(whole)


def same(found: RunDir, whole: RunDir) -> None:
    # What the entry point draws, and the state of a task of one level, are not there in the one process.
    entry = [name for name in everything(found) if name.endswith(("/status.json", "levels.png"))]
    own, other = ({k: v for k, v in everything(each).items() if k not in entry} for each in (found, whole))
    assert own == other


def test_an_array_of_densities_and_seeds_is_the_run_in_one_process(slurm: Cluster, tmp_path: Path) -> None:
    init = {
        "pruning__moment": "init",
        "pruning__criterion": "snip",
        "training__epochs": 2,
        "levels__densities": "0.5,0.2",
    }
    values = keys(tmp_path / "array", **init)
    job = submit(slurm, "array.sbatch", {**values, "run.seeds": "0,1"}, "--array=0-3")
    assert slurm.wait(job) == dict.fromkeys("0123", "COMPLETED"), slurm.logs()
    for seed in (0, 1):
        params, whole = in_one_process(tmp_path / "whole", {**values, "run.seed": seed})
        same(RunDir(tmp_path / "array" / run_dir(params).path.name), whole)


def test_a_job_told_to_stop_goes_back_into_the_queue_and_loses_nothing(slurm: Cluster, tmp_path: Path) -> None:
    values = keys(tmp_path / "job", training__epochs=30, levels__count=1)
    job = submit(slurm, "job.sbatch", values)
    directory = RunDir(tmp_path / "job" / run_dir(build(values)).path.name)
    until(lambda: epochs(directory) >= 3, slurm)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 sends before the time is up
    until(lambda: slurm.field(job, "Restarts") == "1", slurm)
    log = slurm.folder / f"job-{job}_4294967294.out"
    assert "stopped by SIGTERM; the same command goes on from level 0 epoch" in log.read_text()
    assert json.loads(directory.status.read_text())["state"] in ("preempted", "running", "done")
    assert slurm.wait(job) == {job: "COMPLETED"}, slurm.logs()
    assert "resumed level 0 epoch" in log.read_text()
    same(directory, in_one_process(tmp_path / "whole", values)[1])


def test_a_task_outside_the_array_fails_and_is_not_queued_again(slurm: Cluster, tmp_path: Path) -> None:
    values = keys(tmp_path / "job", training__epochs=1, levels__count=2)
    job = submit(slurm, "array.sbatch", values, "--array=7")
    assert slurm.wait(job) == {"7": "FAILED"}
    assert slurm.field(job, "Restarts") == "0"
    assert "SLURM_ARRAY_TASK_ID=7: the array has tasks 0 to 1" in slurm.logs()


@pytest.mark.slow
def test_levels_one_after_the_other_as_an_array_and_as_a_chain(slurm: Cluster, tmp_path: Path) -> None:
    iterative = {"training__epochs": 2, "levels__count": 3, "levels__rate": 0.5}
    array, chain = keys(tmp_path / "array", **iterative), keys(tmp_path / "chain", **iterative)
    whole = in_one_process(tmp_path / "whole", array)[1]
    job = submit(slurm, "array.sbatch", array, "--array=0-2%1")
    assert slurm.wait(job) == dict.fromkeys("012", "COMPLETED"), slurm.logs()
    same(RunDir(tmp_path / "array" / whole.path.name), whole)
    options = ["--output", str(slurm.folder / "chain-%j.out"), "--cpus-per-task=1", "--"]
    told = slurm.run("bash", "configs/slurm/chain.sh", "3", *options, *words(chain), SIEVE_ENV=sys.prefix)
    jobs = [line.rpartition(" ")[2] for line in told.splitlines()]
    for job in jobs:
        assert slurm.wait(job) == {job: "COMPLETED"}, slurm.logs()
    same(RunDir(tmp_path / "chain" / whole.path.name), whole)


@pytest.mark.slow
def test_a_task_waits_for_the_level_before_as_long_as_it_is_told_to(slurm: Cluster, tmp_path: Path) -> None:
    values = keys(tmp_path, training__epochs=2, levels__count=2)
    later = submit(slurm, "job.sbatch", {**values, "levels.only": 1, "levels.wait": 5})
    until(lambda: "waiting for it up to 5 minutes" in slurm.logs(), slurm)
    first = submit(slurm, "job.sbatch", {**values, "levels.only": 0})
    assert slurm.wait(first) == {first: "COMPLETED"}, slurm.logs()
    assert slurm.wait(later) == {later: "COMPLETED"}, slurm.logs()


@pytest.mark.slow
def test_the_end_of_the_time_limit_is_survived(slurm: Cluster, tmp_path: Path) -> None:
    values = keys(tmp_path / "job", training__epochs=120, levels__count=1)
    job = submit(slurm, "job.sbatch", values, "--time=1", "--signal=B:USR1@25")
    assert slurm.wait(job, timeout=500) == {job: "COMPLETED"}, slurm.logs()
    assert int(slurm.field(job, "Restarts")) >= 1
    directory = RunDir(tmp_path / "job" / run_dir(build(values)).path.name)
    same(directory, in_one_process(tmp_path / "whole", values)[1])


@pytest.mark.slow
def test_two_nodes_train_stop_and_go_on(slurm: Cluster, tmp_path: Path) -> None:
    values = keys(tmp_path / "nodes", training__epochs=25, levels__count=1)
    job = submit(slurm, "job.sbatch", values, "--nodes=2")
    directory = RunDir(tmp_path / "nodes" / run_dir(build(values)).path.name)
    until(lambda: epochs(directory) >= 3, slurm)
    record = json.loads(directory.environment.read_text())
    assert (record["ranks"], record["local_ranks"]) == (2, 1)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait(job) == {job: "COMPLETED"}, slurm.logs()
    assert slurm.field(job, "Restarts") == "1"
    alone = {**values, "run.root": str(tmp_path / "alone")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "harness.py"]
    subprocess.run([*torchrun, *words(alone)], cwd=ROOT, env=slurm.environment(), check=True, timeout=300)
    same(directory, RunDir(tmp_path / "alone" / directory.path.name))


@pytest.mark.slow
def test_two_jobs_of_one_run_at_once_the_second_names_the_first(slurm: Cluster, tmp_path: Path) -> None:
    values = keys(tmp_path, training__epochs=40, levels__count=1)
    first = submit(slurm, "job.sbatch", values)
    directory = RunDir(tmp_path / run_dir(build(values)).path.name)
    until(lambda: epochs(directory) >= 1, slurm)
    second = submit(slurm, "job.sbatch", values)
    assert slurm.wait(second) == {second: "FAILED"}, slurm.logs()
    assert f", job {first}, heartbeat" in slurm.logs()
    assert slurm.wait(first) == {first: "COMPLETED"}, slurm.logs()
    assert json.loads(directory.status.read_text())["state"] == "done"
    assert all(name in rows(directory.levels_csv)[0] for name in TIMES[:1])
