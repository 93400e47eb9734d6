"""`python -m utils.reporting table|mean|plot|csv|verify RUN...`: read runs that are finished or still going on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from utils.reporting.rows import read_rows
from utils.reporting.runs import experiments, find_runs, over_seeds, read_runs
from utils.reporting.table import levels_table, render
from utils.reporting.verify import verify
from utils.system import atomic
from utils.system.errors import EXIT_BAD_INPUT, UserError


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
    return parser


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
