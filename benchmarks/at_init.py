"""Every criterion at initialisation, on one short training: which network each of them leaves, and how well it learns.

Runs configs/cifar10/resnet20_at_init.yaml once per method and seed, `--jobs` of them side by side with one thread each.
Writes at_init.csv and at_init.md; see benchmarks/comparison.py.

    python -m benchmarks.at_init --jobs 2 --out assets -- --data.root=data
"""

from __future__ import annotations

import sys

from benchmarks.comparison import Comparison

METHODS = ("magnitude", "taylor", "snip", "grasp", "synflow", "crop", "fisher", "ntk_sap", "prospr")

AT_INIT = Comparison(
    "at_init",
    "ResNet-20, CIFAR-10, density 0.05",
    "configs/cifar10/resnet20_at_init.yaml",
    {
        "random, uniform": ("--pruning.criterion=random", "--pruning.allocation=uniform"),
        "random, balanced": ("--pruning.criterion=random", "--pruning.allocation=balanced"),
        "random, ERK": ("--pruning.criterion=random", "--pruning.allocation=erk"),
        **{name: (f"--pruning.criterion={name}", "--pruning.allocation=global") for name in METHODS},
    },
    ("density", "kept_weights", "effective_density", "dead_layers", "epochs", "final_test_acc"),
    {
        "effective density": lambda rows: f"{rows['effective_density'].mean():.4f}",
        "empty layers": lambda rows: f"{rows['dead_layers'].mean():.1f}",
    },
)

if __name__ == "__main__":
    sys.exit(AT_INIT.main())
