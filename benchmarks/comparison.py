"""Runs of one config in many variants and seeds, side by side, and the table made of them.

What is finished is skipped, so a command can be stopped and given again. Writes NAME.csv (a row per run) and NAME.md
(mean and standard deviation over seeds) under --out. Arguments after `--` go to every run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from utils.params import Params
from utils.params.plan import level_plan
from utils.reporting import read_rows
from utils.system import atomic
from utils.system.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    name: of the files and the command. title: what was trained, for the head of the table. rows: row of the table to
    its arguments. keys: columns of levels.csv kept in the CSV. shown: further columns of the table, heading to a
    function of a method's rows. The last level of every run counts.
    """

    name: str
    title: str
    config: str
    rows: Mapping[str, tuple[str, ...]]
    keys: tuple[str, ...]
    shown: Mapping[str, Callable[[pd.DataFrame], str]] = field(default_factory=dict)

    def arguments(self, row: str, seed: int, more: Sequence[str]) -> list[str]:
        """The command line of one run, without the interpreter."""
        own = ["--config", self.config, *self.rows[row]]
        return [*own, f"--run.seed={seed}", "--data.workers=1", "--run.threads=1", *more]

    def place(self, row: str, seed: int, more: Sequence[str]) -> tuple[RunDir, int]:
        """Where that run leaves its files, and its last level."""
        from harness_params import load
        from utils.record import run_dir

        params: Params = load(self.arguments(row, seed, more))
        return run_dir(params), len(level_plan(params)) - 1

    def train(self, row: str, seed: int, more: Sequence[str]) -> str:
        """Run it unless it is done; returns what to print. Raises RuntimeError with the last lines of a failed run."""
        directory, last = self.place(row, seed, more)
        if directory.level(last).row.is_file():
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
                directory, last = self.place(row, seed, more)
                if directory.level(last).row.is_file():
                    level = next(level for level in read_rows(directory) if level["level"] == last)
                    found.append({"method": row, "seed": seed, **{key: level[key] for key in self.keys}})
        return pd.DataFrame(found)

    def table(self, frame: pd.DataFrame, command: str) -> str:
        """Mean and standard deviation over the seeds, best first, as markdown."""
        heads = ["method", "test accuracy %", "sd", "seeds", *self.shown]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        groups = sorted(frame.groupby("method"), key=lambda item: -item[1]["final_test_acc"].mean())
        for method, rows in groups:
            accuracy = rows["final_test_acc"]
            spread = f"{accuracy.std():.2f}" if len(rows) > 1 else "-"
            cells = [str(method), f"{accuracy.mean():.2f}", spread, str(len(rows))]
            lines.append(f"| {' | '.join([*cells, *(show(rows) for show in self.shown.values())])} |")
        return f"{command}\n\n" + "\n".join(lines) + "\n"

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run what is missing, then write the table; returns the exit code."""
        words = list(sys.argv[1:] if argv is None else argv)
        own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{self.name}")
        parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
        parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to SEEDS-1")
        parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the CSV and the table")
        args = parser.parse_args(own)
        seeds, failed = range(args.seeds), 0
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(self.train, row, seed, more) for seed in seeds for row in self.rows]
            for job in concurrent.futures.as_completed(jobs):
                error = job.exception()
                failed += error is not None
                print(error or job.result(), flush=True)
        frame = self.collect(seeds, more)
        args.out.mkdir(parents=True, exist_ok=True)
        csv, page = args.out / f"{self.name}.csv", args.out / f"{self.name}.md"
        atomic.write_text(csv, frame.to_csv(index=False, lineterminator="\n"))
        shown = " ".join([f"python -m benchmarks.{self.name}", *own])
        head = f"`{shown}`: {self.title}; {platform.machine()}, {os.cpu_count()} cores, one thread a run"
        text = self.table(frame, head)
        atomic.write_text(page, text)
        print(f"\n{text}\nwrote {csv} and {page}")
        return 1 if failed else 0
