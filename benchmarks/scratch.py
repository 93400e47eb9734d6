"""Pruning from Scratch against networks of equal MACs: uniformly thinner ones, and ones of random widths.

Runs configs/cifar10/resnet20_scratch_short.yaml once per row and seed, `--jobs` of them side by side with one thread
each. Writes scratch.csv and scratch.md; see benchmarks/comparison.py.

    python -m benchmarks.scratch --out assets -- --data.root=data
"""

from __future__ import annotations

import sys

from benchmarks.comparison import Comparison

UNIFORM = ("--structured.criterion=random", "--structured.scope=layer")

SCRATCH = Comparison(
    "scratch",
    "ResNet-20, CIFAR-10, half of the MACs",
    "configs/cifar10/resnet20_scratch_short.yaml",
    {
        "learned gates, Scratch-E": (),
        "learned gates, Scratch-B": ("--structured.scratch=b",),
        "uniform width, Scratch-E": (*UNIFORM, "--structured.gate_epochs=10"),
        "uniform width, Scratch-B": (*UNIFORM, "--structured.gate_epochs=10", "--structured.scratch=b"),
        "random widths, Scratch-E": ("--structured.criterion=random", "--structured.gate_epochs=10"),
    },
    ("macs_dense", "macs", "parameters", "kept_share", "epochs", "final_test_acc"),
    {
        "MACs": lambda rows: f"{rows['macs'].mean() / 1e6:.2f} M",
        "share": lambda rows: f"{rows['kept_share'].mean():.4f}",
        "parameters": lambda rows: f"{rows['parameters'].mean():,.0f}",
        "epochs": lambda rows: f"{rows['epochs'].mean():.0f}",
    },
)
"""gate_epochs=10 is its default: rows without gates must not set it."""

if __name__ == "__main__":
    sys.exit(SCRATCH.main())
