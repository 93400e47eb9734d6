"""`python -m benchmarks.level`: what lies between two levels' training, and between the command and its first step.

A run of cifar/resnet18 on the bundled digits, in this process: from the beginning of a level to its training, less what
scores and what measures accuracy. So: loading the weights, selecting, writing masks and tables, rewinding, a fresh
optimizer, comparing digests. Gates: exact counts, nothing pruned alive, and no function compiled by numba after
level 0 (tests/test_compile.py does the same for torch.compile).

The first step is that of `harness.py --config configs/quickstart.yaml`, in processes of their own, its .beton files
written beforehand. `--before FOLDER` is a checkout of an earlier commit, its peer.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import Report
from utils import files, level_masks, levels
from utils.masks import Masks
from utils.params import Params
from utils.params.load import build
from utils.pruning.harness import PruningHarness
from utils.pruning.select import kept_count
from utils.rewinding import Rewinding
from utils.sparsity import Sparsity
from utils.system.console import Console
from utils.system.distributed import World

ROOT = Path(__file__).resolve().parents[1]
SCORING, ACCURACY = "scoring", "accuracy after pruning"
PARTS = {
    SCORING: (PruningHarness, "_score"),
    ACCURACY: (levels.Driver, "_pruned_accuracy"),
    "loading weights": (levels.Driver, "_source_weights"),
    "selecting": (PruningHarness, "select"),
    "paths through the masks": (level_masks.LevelMasks, "effective"),
    "writing masks and tables": (level_masks.LevelMasks, "_save"),
    "rewinding": (Rewinding, "restore"),
    "putting masks in force": (Sparsity, "set"),
    "comparing digests": (levels.Driver, "_agree"),
}
"""What is timed by itself; writing includes the paths where they are first asked for."""


class Stopwatch:
    """CPU seconds of each part, level by level, and of whole changes: from the start of a level to its training."""

    def __init__(self) -> None:
        self.parts: list[dict[str, float]] = [{}]
        self.whole: list[float] = []
        self.compiled: list[int] = []

    @contextlib.contextmanager
    def running(self, compiled: Any) -> Iterator[None]:
        """Time every part within it. compiled: counts functions compiled so far."""
        with contextlib.ExitStack() as stack:
            for label, (owner, name) in PARTS.items():
                stack.enter_context(_replaced(owner, name, functools.partial(self._part, label)))
            stack.enter_context(_replaced(levels.Driver, "_level", self._level))
            stack.enter_context(_replaced(levels.Driver, "_train", functools.partial(self._train, compiled)))
            yield

    def _part(self, label: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        try:
            return call(*args, **kwargs)
        finally:
            self.parts[-1][label] = self.parts[-1].get(label, 0.0) + time.process_time() - begin

    def _level(self, call: Any, *args: Any) -> Any:
        self.parts.append({})
        self._begin = time.process_time()
        return call(*args)

    def _train(self, compiled: Any, call: Any, *args: Any) -> Any:
        self.whole.append(time.process_time() - self._begin)
        self.parts.append(dict(self.parts[-1]))  # what is timed from here on belongs to no change
        found = call(*args)
        self.compiled.append(compiled())
        return found

    def changes(self) -> list[tuple[float, dict[str, float]]]:
        """(whole, parts) of every level after the first."""
        return list(zip(self.whole, self.parts[1::2], strict=True))[1:]


@contextlib.contextmanager
def _replaced(owner: type, name: str, by: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: by(own, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, own)


def config(root: Path, name: str, count: int) -> Params:
    """`count` levels of four steps each."""
    return build({
        "run.root": str(root / "runs"), "data.root": str(root), "data.name": "digits", "data.loader": "ffcv",
        "data.subset": 160, "data.val": 0.0, "data.workers": 1, "model.name": name, "training.epochs": 1,
        "training.batch_size": 40, "levels.count": count, "levels.rate": 0.5,
    })  # fmt: skip


def run_levels(root: Path, name: str, count: int) -> tuple[Stopwatch, list[Masks], int]:
    """Run them in this process; the stopwatch, every level's masks, and pruned weights that are not 0.0 at the ends."""
    from numba.core import event

    from utils import data

    params, watch = config(root, name, count), Stopwatch()
    data.prepare(params)
    with event.install_recorder("numba:compile") as recorder, watch.running(lambda: len(recorder.buffer)):
        run = levels.Driver(params, World(), torch.device("cpu"), Console(main=False)).run()
    masks = [Masks.load(run.level(number).mask) for number in range(count)]
    alive = 0
    for number, mask in enumerate(masks):
        weights = files.load_weights(run.level(number).weights)
        alive += sum(int(weights[name][~kept].count_nonzero()) for name, kept in mask.items())
    return watch, masks, alive


def change(report: Report, name: str, count: int) -> None:
    """The gates and rows of level changes."""
    with tempfile.TemporaryDirectory() as folder:
        watch, masks, alive = run_levels(Path(folder), name, count)
    wanted = [kept_count(0.5**number, masks[0].total) for number in range(count)]
    report.gate("every level keeps its exact count", [one.kept for one in masks] == wanted, f"{wanted}")
    report.gate("no pruned weight is alive", alive == 0, f"{alive} are")
    new = watch.compiled[-1] - watch.compiled[0]
    report.gate("numba compiles nothing after level 0", new == 0, f"{new} functions")
    beyond = [whole - parts[SCORING] - parts[ACCURACY] for whole, parts in watch.changes()]
    report.add(measure.figure(f"level change, {name}", "sieve", statistics.median(beyond), "s", "<= 0.5"))
    for label in PARTS:
        seconds = statistics.median(parts.get(label, 0.0) for _, parts in watch.changes())
        report.add(measure.figure(f"level change, {name}: {label}", "sieve", seconds, "s"))


# The first step ------------------------------------------------------------------------------------------------------


class Start:
    """Starts `harness.py` of a checkout again and again."""

    def __init__(self, tree: Path, scratch: Path, arguments: list[str]) -> None:
        self.tree, self.scratch, self.arguments, self.times, self.cpu = tree, scratch, arguments, 0, list[float]()

    def __call__(self) -> float:
        """Wall-clock seconds to the first step, in a run directory of its own. Raises RuntimeError when it fails."""
        self.times += 1
        command = [sys.executable, str(Path(__file__).with_name("first_step.py")), *self.arguments]
        folder = self.scratch / self.tree.name / str(self.times)
        done = subprocess.run([*command, f"--run.root={folder}"], cwd=self.tree, capture_output=True, text=True)
        told = [line.split() for line in done.stdout.splitlines() if line.startswith("first step ")]
        if done.returncode or not told:
            raise RuntimeError(f"{self.tree}: no first step: {done.stderr.strip()[-500:]}")
        self.cpu.append(float(told[0][3]))
        return float(told[0][2])


def first_step(report: Report, before: Path | None, rounds: int) -> None:
    """Rows of wall-clock and of CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", "configs/quickstart.yaml", f"--data.root={folder}/data"]
        ours = Start(ROOT, Path(folder) / "runs", arguments)
        if before is None:
            ours()
            seconds = [ours() for _ in range(rounds)]
            report.add(measure.figure("command to first step", "sieve", statistics.median(seconds), "s"))
            return
        theirs = Start(before.resolve(), Path(folder) / "before", arguments)
        pairs = measure.interleave(ours, theirs, rounds)
        cpu = measure.Pairs(tuple(ours.cpu[1:]), tuple(theirs.cpu[1:]))
        report.add(measure.cheaper("command to first step", "sieve", "before", pairs, "<= 0.5"))
        report.add(measure.cheaper("command to first step, CPU time", "sieve", "before", cpu, "<= 0.5"))


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/level.csv; 1 where a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.level", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cifar/resnet18", help="network of the level change (cifar/resnet18)")
    parser.add_argument("--levels", type=int, default=5, help="levels of that run (default 5)")
    parser.add_argument("--before", type=Path, help="a checkout to start harness.py of, beside this one")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of starts (default 7)")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where level.csv goes")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report = Report("level", ("torchvision", "ffcv", "numba"), given.out)
    change(report, given.model, given.levels)
    first_step(report, given.before, given.rounds)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
