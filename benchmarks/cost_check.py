"""`python -m benchmarks.cost_check`: the cost model's epochs against those of real runs on one and two processes.

The parts are measured first, each by itself: a bare training step (one process alone, then two side by side that never
speak), a forward pass, and the average of one gradient over loopback. Then `harness.py` runs a dense and a pruned level
of ResNet-18 on handwritten digits at 32 pixels with one process and with two. Their epochs and images per second are
the figures, the model's are the arms; on CPUs nothing of a reduction hides behind the backward pass, which needs the
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
from benchmarks.processes import ROOT, Process, Ranks

BATCH, LEVELS, EPOCHS = 32, 2, 3
MODEL, SIDE = "cifar/resnet18", 32
EVALUATED = 144 + 359
"""Images of digits that are held out, and of its test set."""


def parts_of(rounds: int) -> dict[int, Parts]:
    """The parts of a step, by number of processes."""
    solo: dict[int, list[float]] = {1: [], 2: []}
    forward: dict[int, list[float]] = {1: [], 2: []}
    sums: list[float] = []
    place = {"prefixes": ((), ()), "address": "127.0.0.1", "interfaces": ("lo", "lo")}
    # Batches are those a rank has: all of it on one process, half of it on each of two.
    with Ranks("benchmarks.scaling_arms", MODEL, f"{BATCH // 2}", **place) as ranks:
        ranks.ask("reduce")
        for _ in range(rounds):
            solo[2].append(max(seconds for (seconds,) in ranks.ask("solo", "2")) / 2)
            forward[2].append(max(seconds for (seconds,) in ranks.ask("forward", "2")) / 2)
            sums.append(max(seconds for seconds, _ in ranks.ask("reduce")))
        ((_, entries), _) = ranks.ask("reduce")
    with Ranks("benchmarks.scaling_arms", MODEL, f"{BATCH}", **place) as ranks:
        first: Process = ranks.ranks[0]
        for _ in range(rounds):
            solo[1].append(first.ask("solo", "2")[0] / 2)
            forward[1].append(first.ask("forward", "2")[0] / 2)
    found = {}
    for count in (1, 2):
        mine = BATCH // count
        found[count] = Parts(
            train_rate=mine / statistics.median(solo[count]),
            eval_rate=2 * mine / statistics.median(forward[count]),
            parameters=int(entries),
            prunable=int(entries),
            local_link=cost.BYTES * entries / statistics.median(sums),
            backward=0.0,
        )
    return found


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
        "training.epochs": EPOCHS, "training.precision": "bfloat16", "levels.count": LEVELS,
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
    parser.add_argument("--rounds", type=int, default=9, help="of each part (default 9)")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where cost_check.csv goes")
    given = parser.parse_args(arguments)
    report = Report("cost_check", out=given.out)
    parts = parts_of(given.rounds)
    for count, found in parts.items():
        print(f"{count}: {found}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = {count: real_run(count, Path(folder, f"{count}")) for count in (1, 2)}
    compare(report, parts, runs)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
