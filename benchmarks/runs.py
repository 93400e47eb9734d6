"""What the tables of training runs share: rows of arguments times seeds, side by side, resumed, collected."""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from utils.params import Params
from utils.params.plan import level_plan
from utils.reporting import read_rows
from utils.system import atomic
from utils.system.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("density", "kept_weights", "effective_density", "dead_layers", "epochs", "final_test_acc")
"""Columns of levels.csv a table's CSV has, after the row's name and the seed."""


@dataclass(frozen=True)
class Table:
    """One benchmark.

    name: of the module and of the files it writes; config: what every run begins with; rows: row of the table -> its
    arguments; what: one line for the head of the table; markdown: the runs to the lines of the table; keys: columns of
    levels.csv its CSV has. The last level of every run counts.
    """

    name: str
    config: str
    rows: Mapping[str, tuple[str, ...]]
    what: str
    markdown: Callable[[pd.DataFrame], list[str]]
    keys: tuple[str, ...] = KEPT

    def arguments(self, row: str, seed: int, more: Sequence[str]) -> list[str]:
        """The command line of one run, without the interpreter."""
        own = [f"--run.seed={seed}", "--data.workers=1", "--run.threads=1"]
        return ["--config", self.config, *self.rows[row], *own, *more]

    def run_dir(self, row: str, seed: int, more: Sequence[str]) -> tuple[RunDir, int]:
        """Where that run leaves its files, and its last level."""
        from harness_params import load
        from utils.record import run_dir as directory

        params: Params = load(self.arguments(row, seed, more))
        return directory(params), len(level_plan(params)) - 1

    def train(self, row: str, seed: int, more: Sequence[str]) -> str:
        """Run it unless it is done; returns what to print. RuntimeError holds the last lines of one that failed."""
        place, last = self.run_dir(row, seed, more)
        if place.level(last).row.is_file():
            return f"{row}, seed {seed}: done already"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "harness.py", *self.arguments(row, seed, more)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{row}, seed {seed}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        return f"{row}, seed {seed}: done"

    def collect(self, seeds: Sequence[int], more: Sequence[str]) -> pd.DataFrame:
        """One row per finished run."""
        found = []
        for row in self.rows:
            for seed in seeds:
                place, last = self.run_dir(row, seed, more)
                if place.level(last).row.is_file():
                    level = next(level for level in read_rows(place) if level["level"] == last)
                    found.append({"method": row, "seed": seed, **{key: level[key] for key in self.keys}})
        return pd.DataFrame(found)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run what is missing, then write the CSV and the table; returns the exit code."""
        words = list(sys.argv[1:] if argv is None else argv)
        own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{self.name}")
        parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
        parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to SEEDS-1")
        parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the CSV and the table")
        args = parser.parse_args(own)
        seeds = range(args.seeds)
        failed = 0
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(self.train, row, seed, more) for seed in seeds for row in self.rows]
            for job in concurrent.futures.as_completed(jobs):
                error = job.exception()
                failed += error is not None
                print(error or job.result(), flush=True)
        frame = self.collect(seeds, more)
        args.out.mkdir(parents=True, exist_ok=True)
        table, text = args.out / f"{self.name}.csv", args.out / f"{self.name}.md"
        atomic.write_text(table, frame.to_csv(index=False, lineterminator="\n"))
        told = [word for word in more if not word.startswith("--data.root=")]  # where the images lie changes nothing
        shown = " ".join([f"python -m benchmarks.{self.name}", *own, *(["--", *told] if told else [])])
        head = f"`{shown}`: {self.what}; {platform.machine()}, {os.cpu_count()} cores, one thread a run"
        lines = "\n".join(self.markdown(frame))
        atomic.write_text(text, f"{head}\n\n{lines}\n")
        print(f"\n{head}\n\n{lines}\n\nwrote {table} and {text}")
        return 1 if failed else 0


def spread(accuracy: pd.Series) -> str:
    """The sample standard deviation; a dash for a single run."""
    return f"{accuracy.std():.2f}" if len(accuracy) > 1 else "-"
