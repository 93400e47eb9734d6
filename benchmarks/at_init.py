"""`python -m benchmarks.at_init`: every criterion at initialisation on CIFAR-10, over seeds, as one table.

Runs configs/cifar10/resnet20_at_init.yaml once per row and seed, `--jobs` of them side by side with one thread each.
What is finished is skipped, so the command can be stopped and given again. Writes at_init.csv (a row per run) and
at_init.md (mean and standard deviation over seeds) under --out. Arguments after `--` go to every run:

    python -m benchmarks.at_init --jobs 2 --out assets -- --data.root=data
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from utils.params import Params
from utils.reporting import read_rows
from utils.system import atomic
from utils.system.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/cifar10/resnet20_at_init.yaml"

ROWS: dict[str, tuple[str, ...]] = {
    "random, uniform": ("--pruning.criterion=random", "--pruning.allocation=uniform"),
    "random, balanced": ("--pruning.criterion=random", "--pruning.allocation=balanced"),
    "random, ERK": ("--pruning.criterion=random", "--pruning.allocation=erk"),
    **{
        name: (f"--pruning.criterion={name}", "--pruning.allocation=global")
        for name in ("magnitude", "taylor", "snip", "grasp", "synflow", "crop", "fisher", "ntk_sap", "prospr")
    },
}
"""Row of the table -> its arguments."""


def arguments(row: str, seed: int, more: Sequence[str]) -> list[str]:
    """The command line of one run, without the interpreter."""
    return ["--config", CONFIG, *ROWS[row], f"--run.seed={seed}", "--data.workers=1", "--run.threads=1", *more]


def run_dir(row: str, seed: int, more: Sequence[str]) -> RunDir:
    """Where that run leaves its files."""
    from harness_params import load
    from utils.record import run_dir as directory

    params: Params = load(arguments(row, seed, more))
    return directory(params)


def train(row: str, seed: int, more: Sequence[str]) -> str:
    """Run it unless it is done; returns what to print. Raises RuntimeError with the last lines of a run that failed."""
    if run_dir(row, seed, more).level(0).row.is_file():
        return f"{row}, seed {seed}: done already"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "harness.py", *arguments(row, seed, more)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{row}, seed {seed}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return f"{row}, seed {seed}: done"


def collect(seeds: Sequence[int], more: Sequence[str]) -> pd.DataFrame:
    """One row per finished run."""
    found = []
    for row in ROWS:
        for seed in seeds:
            place = run_dir(row, seed, more)
            if place.levels_csv.is_file():
                level = read_rows(place)[0]
                keys = ("density", "kept_weights", "effective_density", "dead_layers", "epochs", "final_test_acc")
                found.append({"method": row, "seed": seed, **{key: level[key] for key in keys}})
    return pd.DataFrame(found)


def table(frame: pd.DataFrame, command: str) -> str:
    """Mean and standard deviation over the seeds, best first, as markdown."""
    lines = [
        "| method | test accuracy % | sd | seeds | effective density | empty layers |",
        "|---|---|---|---|---|---|",
    ]
    groups = sorted(frame.groupby("method"), key=lambda item: -item[1]["final_test_acc"].mean())
    for method, rows in groups:
        accuracy = rows["final_test_acc"]
        spread = f"{accuracy.std():.2f}" if len(rows) > 1 else "-"
        lines.append(
            f"| {method} | {accuracy.mean():.2f} | {spread} | {len(rows)} | {rows['effective_density'].mean():.4f} | "
            f"{rows['dead_layers'].mean():.1f} |"
        )
    return f"{command}\n\n" + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the table; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.at_init")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to SEEDS-1")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the CSV and the table")
    args = parser.parse_args(own)
    seeds = range(args.seeds)
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(train, row, seed, more) for seed in seeds for row in ROWS]
        for job in concurrent.futures.as_completed(jobs):
            error = job.exception()
            failed += error is not None
            print(error or job.result(), flush=True)
    frame = collect(seeds, more)
    args.out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(args.out / "at_init.csv", frame.to_csv(index=False, lineterminator="\n"))
    shown = " ".join(["python -m benchmarks.at_init", *own])
    head = (
        f"`{shown}`: ResNet-20, CIFAR-10, density 0.05; {platform.machine()}, {os.cpu_count()} cores, one thread a run"
    )
    text = table(frame, head)
    atomic.write_text(args.out / "at_init.md", text)
    print(f"\n{text}\nwrote {args.out / 'at_init.csv'} and {args.out / 'at_init.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
