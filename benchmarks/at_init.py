"""Every criterion at initialisation, on one short training: which network each of them leaves, and how well it learns.

Runs configs/cifar10/resnet20_at_init.yaml once per method and seed, `--jobs` of them side by side with one thread each.
Writes at_init.csv and at_init.md; see benchmarks/runs.py.

    python -m benchmarks.at_init --jobs 2 --out assets -- --data.root=data
"""

from __future__ import annotations

import sys

import pandas as pd

from benchmarks.runs import Table, spread

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


def markdown(frame: pd.DataFrame) -> list[str]:
    """Mean and standard deviation over the seeds, best first."""
    lines = [
        "| method | test accuracy % | sd | seeds | effective density | empty layers |",
        "|---|---|---|---|---|---|",
    ]
    for method, rows in sorted(frame.groupby("method"), key=lambda item: -item[1]["final_test_acc"].mean()):
        accuracy = rows["final_test_acc"]
        lines.append(
            f"| {method} | {accuracy.mean():.2f} | {spread(accuracy)} | {len(rows)} | "
            f"{rows['effective_density'].mean():.4f} | {rows['dead_layers'].mean():.1f} |"
        )
    return lines


TABLE = Table("at_init", "configs/cifar10/resnet20_at_init.yaml", ROWS, "ResNet-20, CIFAR-10, density 0.05", markdown)

if __name__ == "__main__":
    sys.exit(TABLE.main())
