"""SIGKILL at chosen and at random moments of a run, over and over until it is done.

A shot waits for something to happen in the run's folder (a file begun, renamed, written to), then a random while, and
kills one rank, the launcher alone, or everything. Nothing in the code that is killed knows of it.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.inotify import Event, Watch
from tests.faults.jobs import LEAVING, Job
from utils.system.rundir import RunDir


@dataclass(frozen=True)
class Aim:
    """What a shot waits for: an event of `kind` (or one of several, | between) on a path that matches, any of the first
    `upto` since the start; then up to `delay` seconds more."""

    kind: str
    path: str
    upto: int
    delay: float


_WRITTEN = "moved|modify"
"""Of tensors: new releases of safetensors write to a `.tmp` file of their own and rename that to ours; 0.5 does not."""

AIMS = {
    "at any time": Aim("", "", 1, 14.0),
    "starting": Aim("", "", 1, 4.0),
    "training": Aim("moved", r"checkpoint\.safetensors", 4, 0.7),
    "pruning": Aim("create", r"level_0[12]/lock\.\d+\.json", 1, 0.6),
    "layers.csv": Aim("create", r"\.layers\.csv\..*", 1, 0.001),
    "mask": Aim(_WRITTEN, r"\.mask\.safetensors\..*", 1, 0.001),
    "epochs.csv begun": Aim("create", r"\.epochs\.csv\..*", 1, 0.001),
    "tensors begun": Aim("create", r"\.tmp\w{6}|\.\w+\.safetensors\..*", 8, 0.001),
    "rewind point": Aim(_WRITTEN, r"\.rewind\.safetensors\..*", 1, 0.002),
    "checkpoint written": Aim(_WRITTEN, r"\.checkpoint\.safetensors\..*", 4, 0.012),
    "checkpoint renamed": Aim("moved", r"checkpoint\.previous\.safetensors", 3, 0.004),
    "epochs.csv row": Aim("modify", r"epochs\.csv", 3, 0.001),
    "weights": Aim(_WRITTEN, r"\.weights\.safetensors\..*", 1, 0.002),
    "average": Aim(_WRITTEN, r"\.average\.safetensors\..*", 1, 0.002),
    "row.json": Aim("create", r"\.row\.json\..*", 1, 0.001),
    "levels.csv": Aim("create", r"\.levels\.csv\..*", 1, 0.001),
    "status.json": Aim("create", r"\.status\.json\..*", 1, 0.001),
}
"""Moments, by name."""

EACH = {"at any time": 10, "starting": 2, "training": 6, "pruning": 6, "tensors begun": 4, "checkpoint written": 6,
        "checkpoint renamed": 4, "mask": 2, "epochs.csv row": 4, "weights": 2, "row.json": 3,
        "levels.csv": 3}  # fmt: skip
"""How many shots of each aim a long form has; 1 of those not named."""

VICTIMS = ("rank 0", "everything", "last rank", "everything", "launcher")


@dataclass(frozen=True)
class Shot:
    """One kill: what it waits for, whom it hits, which of the events, and how many seconds after it."""

    number: int
    aim: str
    victim: str
    nth: int
    delay: float


@dataclass(frozen=True)
class Hit:
    """What a shot met. found: what the run was doing; left: seconds until the last process was gone."""

    shot: Shot
    after: float
    found: str
    left: float

    def record(self) -> dict[str, object]:
        """As JSON."""
        return {**asdict(self.shot), "after": round(self.after, 2), "found": self.found, "left": round(self.left, 2)}


def shots(seed: int, counts: dict[str, int] | None = None) -> list[Shot]:
    """A shuffled list of shots, the same for the same seed."""
    draw, counts = random.Random(seed), counts or {aim: EACH.get(aim, 1) for aim in AIMS}
    aims = [aim for aim, count in counts.items() for _ in range(count)]
    draw.shuffle(aims)
    victims = [VICTIMS[number % len(VICTIMS)] for number in range(len(aims))]
    draw.shuffle(victims)
    return [
        Shot(number, aim, victim, draw.randint(1, AIMS[aim].upto), draw.uniform(0.0, AIMS[aim].delay))
        for number, (aim, victim) in enumerate(zip(aims, victims, strict=True))
    ]


def fire(shot: Shot, root: Path, ranks: int, keys: Sequence[str] = (), timeout: float = 240.0) -> Hit | None:
    """Start the run in `root`, or start it again, and kill it as the shot says. None when it was done before that.

    Raises AssertionError when the run ends otherwise, or processes are left behind.
    """
    root.mkdir(parents=True, exist_ok=True)
    with Watch(root) as watch:
        job = Job(root, ranks, *keys)
        try:
            targets = _await(shot, job, watch, timeout)
            for pid in targets or ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if targets is None:
                assert job.wait() == 0, f"{shot}: exit code {job.wait()}\n{job.output[-4000:]}"
                return None
            after, found = time.monotonic() - job.begin, _met(shot, root, watch)
            left = job.gone(LEAVING if shot.victim == "launcher" else 60.0)
            return Hit(shot, after, found, left)
        finally:
            job.end()


def _await(shot: Shot, job: Job, watch: Watch, timeout: float) -> list[int] | None:
    """Wait for the shot's moment; returns the processes to kill, None when the job ended before."""
    aim, met, limit = AIMS[shot.aim], 0, time.monotonic() + timeout
    targets = [job.agent.pid]
    while aim.kind and met < shot.nth:
        if job.agent.poll() is not None:
            return None
        assert time.monotonic() < limit, f"{shot}: not met\n{job.output[-3000:]}"
        events = list(watch.events(0.2))
        met += sum(_matches(aim, event) for event in events)
        if not events:
            targets = _targets(shot.victim, job)  # looking takes longer than most moments last
    # Short whiles by turning round: sleeping is not that exact.
    moment = time.perf_counter() + shot.delay
    if shot.delay > 0.1:
        time.sleep(shot.delay - 0.1)
        targets = _targets(shot.victim, job)
    while time.perf_counter() < moment:
        pass
    return targets if job.agent.poll() is None else None


def _matches(aim: Aim, event: Event) -> bool:
    """Whether the aim's path, a name or the end of a path in the run's folder, is the event's."""
    path = event.path.partition("/")[2] if "/" in aim.path else event.path.rpartition("/")[2]
    return event.kind in aim.kind.split("|") and re.fullmatch(aim.path, path) is not None


def _targets(victim: str, job: Job) -> list[int]:
    """Processes of a victim. Before there are workers, the launcher is all there is to hit."""
    workers, agent = job.workers(), job.agent.pid
    if victim == "launcher" or not workers:
        return [agent]
    if victim == "everything":
        return [agent, *job.processes()]
    return [workers[min(workers) if victim == "rank 0" else max(workers)]]


def _met(shot: Shot, root: Path, watch: Watch) -> str:
    """What the run was at when it was hit."""
    while list(watch.events(0.0)):
        pass
    if watch.last is None:
        return "starting"  # what is there is of the process before
    row = watch.last.kind == "modify" and watch.last.path.endswith("/epochs.csv")
    return "writing a row of epochs.csv" if row and AIMS[shot.aim].delay < 0.01 else doing(root)


def doing(root: Path) -> str:
    """What the run in `root` is at, by the files that are there."""
    runs = [entry for entry in root.iterdir() if entry.is_dir()]
    if not runs:
        return "starting"
    run = RunDir(runs[0])
    temporaries = sorted(_temporaries(run.path), key=lambda path: "lock" in path.name)
    if temporaries:
        return f"writing {_target(temporaries[0])}"
    locked = [n for n in run.levels() if any(run.level(n).path.glob("lock.*.json"))]
    if not locked:
        return "starting or between levels"
    place = run.level(locked[-1])
    if place.row.exists():
        return "recording"
    if not place.mask.exists():
        return "pruning"
    if place.weights.exists():
        return "recording"
    if place.checkpoint.exists():
        return "training"
    return "starting to train" if place.epochs.exists() else "measuring the pruned network"


def _temporaries(folder: Path) -> Iterator[Path]:
    for path in folder.rglob(".*tmp*"):
        if path.exists():
            yield path


def _target(temporary: Path) -> str:
    """The file that a temporary was to become."""
    match = re.match(r"\.(.+\.(?:safetensors|csv|json|yaml|png))\.", temporary.name)
    return match[1] if match else "lock" if temporary.name.startswith(".lock") else "tensors"
