"""A real SLURM on this machine for the length of a test: munged, slurmctld and two slurmd, all in one folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}

CONF = """
ClusterName=sieve
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={ctld}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=600
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=16 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=16 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no SLURM can be started here; None when one can."""
    programs = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if programs:
        return f"needs SLURM and munge: apt-get install slurm-wlm munge ({programs[0]} is missing)"
    return None if os.geteuid() == 0 else "SLURM's daemons are started as root here"


@dataclass
class Cluster:
    """A running cluster of two nodes with 16 (pretended) CPUs each."""

    folder: Path

    def run(self, *command: str, **env: str) -> str:
        """Run a command of SLURM's from the repository; returns its output."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment(**env), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout.strip()

    def environment(self, **env: str) -> dict[str, str]:
        """What SLURM's commands, and the jobs they submit, run with."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "TORCHELASTIC"))
        }
        return {**clean, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1", **env}

    def submit(self, *arguments: str, **env: str) -> str:
        """sbatch; returns the job's number."""
        out = ["--output", str(self.folder / "job-%A_%a.out"), "--cpus-per-task=1"]
        return self.run("sbatch", "--parsable", *out, *arguments, **env).partition(";")[0]

    def states(self, job: str) -> dict[str, str]:
        """State of every task of a job (or of the job), by its number."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        fields = [dict(part.partition("=")[::2] for part in line.split()) for line in lines]
        return {f.get("ArrayTaskId", f["JobId"]): f["JobState"] for f in fields}

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait(self, job: str, timeout: float = 240.0) -> dict[str, str]:
        """States once every task has ended."""
        deadline = time.monotonic() + timeout
        while not set((states := self.states(job)).values()) <= ENDED:
            assert time.monotonic() < deadline, f"{states}\n{self.logs()}"
            time.sleep(0.5)
        return states

    def logs(self) -> str:
        """The end of all output of jobs, for a test that fails."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.out")))


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start everything in `folder`, wait until both nodes are idle, and stop it all afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir()
    ports = _free_ports(3)
    names = {"ctld": ports[0], "one": ports[1], "two": ports[2]}
    (folder / "slurm.conf").write_text(CONF.format(host=socket.gethostname(), folder=folder, **names))
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    here = Cluster(folder)
    started: list[subprocess.Popen[bytes]] = []

    def daemon(*command: str) -> None:
        with open(folder / f"{Path(command[0]).name}.{len(started)}.log", "wb") as log:
            started.append(
                subprocess.Popen(command, env=here.environment(), stdout=log, stderr=log, start_new_session=True)
            )

    try:
        places = [f"--{what}={folder}/munge.{what.partition('-')[0]}" for what in ("socket", "key-file", "pid-file")]
        daemon("munged", "--foreground", "--force", *places, f"--seed-file={folder}/munge.seed",
               f"--log-file={folder}/munge.log")  # fmt: skip
        _until((folder / "munge.socket").exists, 10.0, "munged does not start")
        daemon("slurmctld", "-D")
        for node in ("one", "two"):
            daemon("slurmd", "-D", "-N", node)
        _until(lambda: _idle(here), 60.0, f"SLURM does not start; see {folder}")
        yield here
    finally:
        with contextlib.suppress(Exception):
            here.run("scancel", "--user=root")
            time.sleep(1.0)
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def _idle(here: Cluster) -> bool:
    try:
        return here.run("sinfo", "--noheader", "--format=%T %D") == "idle 2"
    except AssertionError:
        return False


def _until(holds: object, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise RuntimeError(what)
        time.sleep(0.2)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
