"""`python -m benchmarks.recipes`: default training, each recipe and all of them on one sparse network, over seeds.

Runs configs/cifar10/resnet20_at_init.yaml (density 0.05, random ERK masks, 15,000 images) for 12 epochs, once per row
and seed, `--jobs` side by side with one thread each. Rows of one seed share initial weights, masks and sample order,
so that differences are paired. What is finished is skipped, so the command can be stopped and given again. Writes
recipes.csv (a row per run) and recipes.md (means and spreads) under --out. Arguments after `--` go to every run:

    python -m benchmarks.recipes --jobs 2 --out assets -- --data.root=data

Rescaling reads up to 768 images in each of its 180 steps: on two cores it takes longer than the training.
"""

from __future__ import annotations

import sys

import pandas as pd

from benchmarks.runs import Table, spread

_EPOCHS = ("--training.epochs=12", "--training.eval_every=12")

ROWS: dict[str, tuple[str, ...]] = {
    "default": _EPOCHS,
    "soft": ("--config", "configs/recipe/soft.yaml", *_EPOCHS),
    "ghost": ("--config", "configs/recipe/ghost.yaml", *_EPOCHS),
    "smoothing": ("--config", "configs/recipe/smoothing.yaml", *_EPOCHS),
    "rescale": ("--config", "configs/recipe/rescale.yaml", *_EPOCHS),
    "all": ("--config", "configs/recipe/all.yaml", *_EPOCHS),
}
"""Row of the table -> its arguments."""


def markdown(frame: pd.DataFrame) -> list[str]:
    """Mean and standard deviation over the seeds, and of the differences to default training of the same seed."""
    default = frame[frame["method"] == "default"].set_index("seed")["final_test_acc"]
    lines = [
        "| recipe | test accuracy % | sd | minus default, paired | sd | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        rows = frame[frame["method"] == name].set_index("seed")["final_test_acc"]
        if rows.empty:
            continue
        gain = (rows - default).dropna()
        paired = "-" if name == "default" or gain.empty else f"{gain.mean():+.2f}"
        apart = "-" if name == "default" else spread(gain)
        lines.append(f"| {name} | {rows.mean():.2f} | {spread(rows)} | {paired} | {apart} | {len(rows)} |")
    return lines


TABLE = Table(
    "recipes",
    "configs/cifar10/resnet20_at_init.yaml",
    ROWS,
    "ResNet-20, 15,000 images of CIFAR-10, random ERK masks of density 0.05, 12 epochs",
    markdown,
)

if __name__ == "__main__":
    sys.exit(TABLE.main())
