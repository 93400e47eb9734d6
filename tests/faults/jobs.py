"""Runs under torchrun as their users start them: processes that are found, killed and waited for from outside."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from utils.reporting.columns import COLUMNS
from utils.system.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]

TINY = (
    "--run.device=cpu",
    "--data.name=digits",
    "--data.loader=device",
    "--data.subset=480",
    "--model.name=cifar/resnet20",
    "--training.batch_size=48",
    "--training.precision=float32",
    "--levels.densities=0.5,0.2",
    "--distributed.timeout=60",
)
"""Three levels on digits, a second or so an epoch of eight to ten steps."""

FULL = (
    *TINY,
    "--training.epochs=4",
    "--run.checkpoint_epochs=1",
    "--run.checkpoint_minutes=0.004",  # some within an epoch
    "--pruning.criterion=taylor",  # reads data, so that pruning lasts and needs all ranks
    "--pruning.rounds=8",
    "--levels.rewind=wr",
    "--levels.rewind_step=1ep3it",
    "--training.ema=0.9",
)
"""The same, with everything written that a run can write."""

LEAVING = 10.0
"""Seconds within which the workers of a killed agent are gone."""

TIMING = {column.name for column in COLUMNS if column.timing} | {"images_per_second", "data_wait", "seconds"}
"""Columns that differ between two runs of the same bits."""


class Job:
    """One torchrun and its workers. They are known by the folder they write to, which no other job of theirs has."""

    def __init__(
        self,
        root: Path,
        ranks: int,
        *keys: str,
        launcher: Sequence[str] = ("--standalone",),
        prefix: Sequence[str] = (),
        base: Sequence[str] = FULL,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it. `prefix` goes before the interpreter, `launcher` to torchrun, `base` and `keys` to harness.py."""
        self.root, self.ranks = root, ranks
        self.log = log or root.with_name(f"{root.name}.log")
        torchrun = [sys.executable, "-m", "torch.distributed.run", *launcher, f"--nproc-per-node={ranks}"]
        command = [*prefix, *torchrun, str(ROOT / "harness.py"), f"--run.root={root}", *base, *keys]
        self.begin = time.monotonic()
        self._from = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as out:
            self.agent = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})},
            )

    @property
    def output(self) -> str:
        """What this job has printed so far."""
        with open(self.log, "rb") as handle:
            handle.seek(self._from)
            return handle.read().decode(errors="replace")

    @property
    def traceback(self) -> bool:
        """Whether a traceback leads through our code; torchrun has one of its own for every error."""
        return re.search(rf'File "{re.escape(str(ROOT))}/(harness|utils)', self.output) is not None

    @property
    def run(self) -> RunDir:
        """The only run under the root."""
        (path,) = (entry for entry in self.root.iterdir() if entry.is_dir())
        return RunDir(path)

    def processes(self) -> list[int]:
        """All of them: launchers, workers, and what workers forked."""
        mark, found = os.fsencode(f"--run.root={self.root}"), []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and mark in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def workers(self) -> dict[int, int]:
        """Process of each rank that is there."""
        found = {}
        for pid in self.processes():
            if (rank := _environment(pid).get("RANK")) is not None:
                found.setdefault(int(rank), pid)
        return found

    def wait(self, timeout: float = 240.0) -> int:
        """torchrun's exit code."""
        return self.agent.wait(timeout)

    def finish(self, timeout: float = 240.0) -> str:
        """Wait for an end with exit code 0; returns the output."""
        code = self.wait(timeout)
        assert code == 0, f"exit code {code}\n{self.output[-4000:]}"
        return self.output

    def wait_for(self, condition: str | Callable[[str], object], timeout: float = 120.0) -> None:
        """Wait until the output holds a text, or fulfils a condition."""
        limit = time.monotonic() + timeout
        while not (condition in self.output if isinstance(condition, str) else condition(self.output)):
            assert self.agent.poll() is None, f"ended before {condition!r}\n{self.output[-4000:]}"
            assert time.monotonic() < limit, f"no {condition!r} within {timeout} s\n{self.output[-4000:]}"
            time.sleep(0.02)

    def signal(self, number: int, *pids: int) -> None:
        """Send a signal to processes that may be gone already."""
        for pid in pids:
            if pid in self.processes():
                os.kill(pid, number)

    def gone(self, within: float) -> float:
        """Wait until no process is left; returns how long it took. Fails after `within` seconds, ending them."""
        begin = time.monotonic()
        while True:
            self.agent.poll()
            left = [pid for pid in self.processes() if not _is_zombie(pid)]
            if not left:
                self.agent.wait()
                return time.monotonic() - begin
            if time.monotonic() - begin > within:
                self.end()
                raise AssertionError(f"still there after {within} s: {left}\n{self.output[-3000:]}")
            time.sleep(0.05)

    def end(self) -> None:
        """End whatever is left, for tests that failed."""
        self.signal(signal.SIGKILL, *self.processes())
        self.agent.wait()


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode(errors="replace").split("=", 1) for entry in entries if b"=" in entry)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# What a run leaves ------------------------------------------------------------------------------------------------


def everything(run: RunDir) -> dict[str, Any]:
    """Every file a run leaves and what is in it, byte for byte, timing columns apart.

    Not in it: the plot, and what tells of the process rather than of the result (environment.json, config.yaml).
    """
    found: dict[str, Any] = {}
    for path in sorted(run.path.rglob("*")):
        name = str(path.relative_to(run.path))
        if path.is_dir() or path in (run.plot, run.environment, run.config):
            continue
        if path.suffix == ".safetensors":
            found[name] = tensors(path)
        elif path.suffix == ".csv":
            found[name] = table(path)
        elif path.name == "row.json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in TIMING}
        else:
            found[name] = path.read_bytes()
    return found


def tensors(path: Path) -> dict[str, Any]:
    """A safetensors file as bytes by name, with its metadata (whose order in the file is arbitrary)."""
    with safe_open(str(path), "np") as handle:
        arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        content = {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in arrays.items()}
        return {**content, "": handle.metadata()}


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV without its timing columns."""
    with open(path, newline="", encoding="utf-8") as handle:
        return [{key: value for key, value in row.items() if key not in TIMING} for row in csv.DictReader(handle)]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the files that are not in both, or not the same in both."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
