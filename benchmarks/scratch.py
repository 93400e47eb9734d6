"""Pruning from Scratch against networks of equal MACs: uniformly thinner ones, and ones of random widths.

Runs configs/cifar10/resnet20_scratch_short.yaml once per row and seed, `--jobs` of them side by side with one thread
each. Writes scratch.csv and scratch.md; see benchmarks/runs.py.

    python -m benchmarks.scratch --out assets -- --data.root=data
"""

from __future__ import annotations

import sys

import pandas as pd

from benchmarks.runs import Table, spread

UNIFORM = ("--structured.criterion=random", "--structured.scope=layer")

ROWS: dict[str, tuple[str, ...]] = {
    "learned gates, Scratch-E": (),
    "learned gates, Scratch-B": ("--structured.scratch=b",),
    "uniform width, Scratch-E": (*UNIFORM, "--structured.gate_epochs=10"),
    "uniform width, Scratch-B": (*UNIFORM, "--structured.gate_epochs=10", "--structured.scratch=b"),
    "random widths, Scratch-E": ("--structured.criterion=random", "--structured.gate_epochs=10"),
}
"""Row of the table -> its arguments. gate_epochs=10 is the default: rows without gates must not set another."""


def markdown(frame: pd.DataFrame) -> list[str]:
    """Mean and standard deviation over the seeds, best first, and what the networks cost."""
    lines = [
        "| method | test accuracy % | sd | seeds | MACs | share | parameters | epochs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, rows in sorted(frame.groupby("method"), key=lambda item: -item[1]["final_test_acc"].mean()):
        accuracy, macs = rows["final_test_acc"], rows["macs"].mean() / 1e6
        lines.append(
            f"| {method} | {accuracy.mean():.2f} | {spread(accuracy)} | {len(rows)} | {macs:.2f} M "
            f"| {rows['kept_share'].mean():.4f} | {rows['parameters'].mean():,.0f} | {rows['epochs'].mean():.0f} |"
        )
    return lines


TABLE = Table(
    "scratch",
    "configs/cifar10/resnet20_scratch_short.yaml",
    ROWS,
    "ResNet-20, CIFAR-10, half of the MACs",
    markdown,
    ("macs_dense", "macs", "parameters", "kept_share", "epochs", "final_test_acc"),
)

if __name__ == "__main__":
    sys.exit(TABLE.main())
