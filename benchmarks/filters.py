"""`python -m benchmarks.filters`: what data.resize does to test accuracy: the same model, epochs and seeds per filter.

CIFAR-10, stored as JPEG of quality 90, trained and evaluated at `--size` pixels with random resized crops: boxes shrink
by up to 32 / size, evaluation by all of it, about as photographs of 500 pixels do at 224 (1.4 and 1.5 on average). At
16 pixels and below, whole images are decoded at half their size. These are small photographs of one data set: they
order the filters where images shrink moderately and say little about details that only large photographs have.

Runs are ordinary ones, kept under --runs: what is finished is skipped. Arguments after `--` go to every run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import measure
from benchmarks.measure import Report, Row
from utils.reporting import read_rows
from utils.system.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/cifar10/resnet20_dense.yaml"
FILTERS = ("ffcv", "area", "bilinear")


def arguments(resize: str, seed: int, size: int, epochs: int, runs: Path, more: Sequence[str]) -> list[str]:
    """The command line of one run, without the interpreter."""
    own = [
        f"--data.resize={resize}", f"--run.seed={seed}", f"--run.root={runs}", f"--training.epochs={epochs}",
        f"--data.image_size={size}", "--data.augment=rrc", "--data.write_mode=jpg", "--data.max_resolution=32",
        "--data.workers=1", "--run.threads=1", "--run.name=filters",
    ]  # fmt: skip
    return ["--config", CONFIG, *own, *more]


def accuracy(words: list[str]) -> float:
    """Percent of the test set after a run's last epoch. Raises RuntimeError with the last words of one that failed."""
    from harness_params import load
    from utils.record import run_dir

    command = [sys.executable, "harness.py", *words]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    place: RunDir = run_dir(load(words))
    return float(read_rows(place)[0]["final_test_acc"])


def compared(name: str, resize: str, found: list[float], against: list[float]) -> Row:
    """A row of accuracies per seed: the ratio is the median over seeds, the values are means."""
    ratio, spread = measure.median_and_spread([one / other for one, other in zip(found, against, strict=True)])
    means = statistics.mean(found), statistics.mean(against)
    return Row(name, f"resize={resize}", "resize=ffcv", ratio, spread, "", None, *means, "% test accuracy", len(found))


def main(argv: Sequence[str]) -> int:
    """Train what is missing, then write benchmarks/out/filters.csv."""
    words = list(argv)
    own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filters", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=20, help="image side (default 20)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to SEEDS-1")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where filters.csv goes")
    given = parser.parse_args(own)
    report = Report("filters", ("ffcv", "torchvision"), given.out)
    found: dict[str, list[float]] = {resize: [] for resize in FILTERS}
    for seed in range(given.seeds):
        for resize in FILTERS:
            found[resize].append(accuracy(arguments(resize, seed, given.size, given.epochs, given.runs, more)))
            print(f"seed {seed}, resize={resize}: {found[resize][-1]:.2f} %", flush=True)
    name = f"CIFAR-10 at {given.size} px, ResNet-20, {given.epochs} epochs"
    for resize in FILTERS[1:]:
        report.add(compared(name, resize, found[resize], found["ffcv"]))
    for resize in FILTERS:
        if given.seeds > 1:
            print(f"resize={resize}: {statistics.mean(found[resize]):.2f} ± {statistics.stdev(found[resize]):.2f} %")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
