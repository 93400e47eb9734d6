"""`python -m benchmarks.cost_check`: the cost model's epochs against those of real runs on one and two processes.

`harness.py` runs a dense and a pruned level of ResNet-18 on handwritten digits at 32 pixels with one process, then with
two. The parts are measured by themselves, before and after each run, for a shared machine is not the same from minute
to minute: a bare training step (of one process, or of two side by side that never speak), a forward pass, and the
average of one gradient over loopback. On CPUs nothing of a reduction hides behind the backward pass, which needs the
same cores. What a level change and the start take is read off the run of one process and used for that of two.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import cost, measure
from benchmarks.cost import Parts
from benchmarks.measure import Pairs, Report, cheaper
from benchmarks.processes import ROOT, Ranks

BATCH, LEVELS, EPOCHS = 16, 2, 2
MODEL, SIDE = "cifar/resnet18", 32
TRAINING, EVALUATED = 320, 32 + 359
"""Images of digits used; a tenth is held out and evaluated, as its test set is."""


class Samples:
    """Seconds of the parts of one number of processes, taken whenever asked; a context manager."""

    def __init__(self, count: int) -> None:
        self.count, self.mine = count, BATCH // count
        self._times: list[tuple[float, ...]] = []
        place = {"prefixes": ((), ()), "address": "127.0.0.1", "interfaces": ("lo", "lo")}
        self._ranks = Ranks("benchmarks.scaling_arms", MODEL, f"{self.mine}", **place)
        ((_, self.entries), _) = self._ranks.ask("reduce")

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *error: object) -> None:
        self._ranks.__exit__()

    def take(self, rounds: int) -> None:
        """Measure every part `rounds` times: step, forward pass and sum."""
        for _ in range(rounds):
            sums = max(seconds for seconds, _ in self._ranks.ask("reduce"))
            self._times.append((self._slowest("solo"), self._slowest("forward"), sums))

    def _slowest(self, word: str) -> float:
        if self.count == 1:
            return self._ranks.ranks[0].ask(word, "2")[0] / 2
        return max(seconds for (seconds,) in self._ranks.ask(word, "2")) / 2

    def parts(self) -> Parts:
        """The medians of all that was measured, as parts of the model."""
        step, forward, sums = (statistics.median(column) for column in zip(*self._times, strict=True))
        return Parts(
            train_rate=self.mine / step,
            eval_rate=2 * self.mine / forward,
            parameters=int(self.entries),
            prunable=int(self.entries),
            local_link=cost.BYTES * self.entries / sums,
            backward=0.0,
        )


@dataclass
class Run:
    """What a real run took: seconds of its epochs, images/s of each, seconds of levels, and wall clock."""

    epochs: list[float]
    rates: list[float]
    levels: float
    wall: float
    steps: int


def real_run(count: int, folder: Path) -> Run:
    """Train the levels with `count` processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    options = {
        "run.root": folder, "run.device": "cpu", "run.threads": 1, "model.name": MODEL, "data.name": "digits",
        "data.loader": "device", "data.image_size": SIDE, "data.augment": "none", "training.batch_size": BATCH,
        "data.subset": TRAINING, "training.epochs": EPOCHS, "training.precision": "bfloat16", "levels.count": LEVELS,
        "run.checkpoint_minutes": 60,
    }  # fmt: skip
    begin = time.perf_counter()
    command = [sys.executable, *launcher, "harness.py", *(f"--{key}={value}" for key, value in options.items())]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - begin
    (place,) = folder.iterdir()
    rows = [row for level in sorted(place.glob("level_*")) for row in table(level / "epochs.csv")]
    steps = int(float(rows[EPOCHS - 1]["step"])) // EPOCHS
    return Run(
        [float(row["seconds"]) for row in rows],
        [float(row["images_per_second"]) for row in rows],
        sum(float(row["seconds"]) for row in table(place / "levels.csv")),
        wall,
        steps,
    )


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with open(path, encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def compare(report: Report, parts: dict[int, Parts], runs: dict[int, Run]) -> None:
    """Rows of the model over what was measured."""
    one = runs[1]
    change = (one.levels - sum(one.epochs)) / LEVELS
    start = one.wall - one.levels
    for count, run in runs.items():
        settled = replace(parts[count], images=run.steps * BATCH, eval_images=EVALUATED)
        settled = replace(settled, change=change, start=start)
        step = BATCH / cost.step(settled, BATCH, count, count)
        epoch = cost.epoch(settled, BATCH, count, count)
        whole = cost.run(settled, BATCH, count, count, [1.0, 0.8], EPOCHS)
        speed = Pairs((1 / step,) * len(run.rates), tuple(1 / rate for rate in run.rates))
        report.add(measure.faster(f"{count} processes: training", "model", "run", speed))
        pairs = Pairs((epoch,) * len(run.epochs), tuple(run.epochs))
        report.add(cheaper(f"{count} processes: epoch", "model", "run", pairs))
        report.add(cheaper(f"{count} processes: whole run", "model", "run", Pairs((whole,), (run.wall,))))


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/cost_check.csv."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_check", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each part, before and after a run (default 5)")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where cost_check.csv goes")
    given = parser.parse_args(arguments)
    report = Report("cost_check", out=given.out)
    parts, runs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            with Samples(count) as samples:
                samples.take(given.rounds)
                runs[count] = real_run(count, Path(folder, f"{count}"))
                samples.take(given.rounds)
                parts[count] = samples.parts()
            print(f"{count}: {parts[count]}", flush=True)
    compare(report, parts, runs)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
