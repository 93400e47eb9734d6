"""`python -m utils.reporting COMMAND`: read runs that are finished or still going on.

table, mean, plot, csv RUN...       levels of runs, from their rows alone
verify RUN...                       whether the files of a run hold what they say
activations RUN --level N           what comes out of every activation of a level's network
masks FILE-OR-RUN...                Hamming and Jaccard of masks, layer by layer, for every pair
connectivity RUN RUN --level N      error along the line between the weights of two runs
gradients RUN --level N             plot of gradients.csv, which training.gradient_norms writes
export RUN --level N                the level's network as an ONNX file, checked by onnxruntime against torch
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.reporting.rows import read_rows
from utils.reporting.runs import experiments, find_runs, over_seeds, read_runs
from utils.reporting.table import levels_table, render
from utils.reporting.verify import verify
from utils.system import atomic
from utils.system.errors import EXIT_BAD_INPUT, UserError
from utils.system.optional import ONNX, require


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m utils.reporting", description="Tables, plots and CSVs of runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in {
        "table": "one line per level of every run",
        "mean": "mean and standard deviation over seeds, per experiment and density",
        "plot": "accuracy against density, one curve per experiment",
        "csv": "the levels of all runs with their configs, in one file",
        "verify": "recompute digests, counts, zeros and rows; say what does not hold (exit code 1)",
    }.items():
        command = commands.add_parser(name, help=help)
        command.add_argument("runs", nargs="+", metavar="RUN", help="run directory, its levels.csv, or a quoted glob")
        if name in ("plot", "csv"):
            command.add_argument("--out", required=True, metavar="FILE", help="file to write")
        if name in ("plot", "mean"):
            command.add_argument("--metric", default="final_test_acc", help="column to show (default: %(default)s)")
    _add_analyses(commands)
    return parser


def _add_analyses(commands: Any) -> None:
    """The commands that look into networks; each writes --out (CSV) and beside it a plot (.png)."""
    helps = {
        "activations": "near-zero values, dead channels, mean and spread of every activation, as CSV and plot",
        "masks": "Hamming and Jaccard of masks, layer by layer, for every pair, as CSV and heat map",
        "connectivity": "error along the line between the weights of two runs, as CSV and plot",
        "gradients": "plot of the gradient norms of a level's first steps",
        "export": "the network of a level as an ONNX file for any number of images, shrunk or with its pruned zeros",
    }
    made = {name: commands.add_parser(name, help=text) for name, text in helps.items()}
    made["activations"].add_argument("run", metavar="RUN")
    made["activations"].add_argument("--split", default="test", help="train, val or test (default: %(default)s)")
    made["activations"].add_argument("--near", type=float, default=0.01, help="|a| up to this is near zero")
    made["masks"].add_argument("places", nargs="+", metavar="FILE-OR-RUN")
    made["masks"].add_argument("--measure", default="jaccard", choices=("jaccard", "hamming_share"))
    made["connectivity"].add_argument("runs", nargs=2, metavar="RUN")
    made["connectivity"].add_argument("--second-level", type=int, help="level of the second run (default: --level)")
    made["connectivity"].add_argument("--points", type=int, default=11, help="points with both ends")
    made["connectivity"].add_argument("--batches", type=int, default=50, help="training batches for BatchNorm")
    made["gradients"].add_argument("run", metavar="RUN")
    made["export"].add_argument("run", metavar="RUN")
    made["export"].add_argument("--export", default="onnx", choices=("onnx",), help="format (default: %(default)s)")
    made["export"].add_argument("--average", action="store_true", help="the averaged weights (training.ema)")
    for name, command in made.items():
        if name != "masks":
            command.add_argument("--level", type=int, required=True, metavar="N")
        if name == "export":
            command.add_argument("--out", required=True, type=Path, metavar="FILE", help="ONNX file to write")
            continue
        ending = "image" if name == "gradients" else "CSV"
        command.add_argument("--out", required=True, type=Path, metavar="FILE", help=f"{ending} to write")


def _mean(runs: Sequence[str], metric: str) -> str:
    frame = read_runs(runs)
    if metric not in frame.columns or frame[metric].dtype != "float64":
        raise UserError(f"--metric={metric}: not a column of fractional numbers in levels.csv")
    lines = []
    for label, rows in experiments(frame):
        for row in over_seeds(rows, metric).itertuples():
            spread = "-" if row.runs == 1 else f"{row.sd:.2f}"
            lines.append([label, f"{row.density:.4g}", str(row.runs), f"{row.mean:.2f}", spread])
    return render(["experiment", "density", "runs", metric, "sd"], lines, left=1)


def _table(runs: Sequence[str]) -> str:
    rows = [row for run in find_runs(runs) for row in read_rows(run)]
    return levels_table(rows)


def _verify(runs: Sequence[str]) -> int:
    """Print what does not hold of each run; returns the exit code."""
    failed = 0
    for run in find_runs(runs):
        problems = verify(run)
        finished = sum(run.level(number).row.is_file() for number in run.levels())
        for problem in problems:
            print(problem)
        if not problems:
            print(f"{run.path}: all holds ({finished} finished level{'s' * (finished != 1)})")
        failed += bool(problems)
    return 1 if failed else 0


def _run(args: argparse.Namespace) -> str:
    if args.command == "table":
        return _table(args.runs)
    if args.command == "mean":
        return _mean(args.runs, args.metric)
    if args.command == "plot":
        from utils.reporting.plot import plot_levels

        return f"wrote {plot_levels(args.runs, args.out, args.metric)}"
    if args.command == "export":
        require("--export onnx", ONNX)
        from utils.analysis.export import export_run

        return export_run(args.run, args.level, args.out, args.average)
    if args.command in ("activations", "masks", "connectivity", "gradients"):
        from utils.analysis import commands  # it imports torch

        return commands.run(args)
    frame = read_runs(args.runs)
    atomic.write_text(args.out, frame.to_csv(index=False, lineterminator="\n"))
    return f"wrote {args.out}: {len(frame)} levels of {frame['run'].nunique()} runs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "verify":
            return _verify(args.runs)
        print(_run(args))
    except UserError as error:
        print(f"sieve: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        print(f"sieve: {error.filename or args.command}: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
