"""Test accuracy against density: one curve per experiment, mean and band over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.reporting.columns import BY_NAME
from utils.reporting.runs import experiments, over_seeds, read_runs
from utils.system import atomic
from utils.system.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MAX_TICKS = 9


def plot_levels(run_dirs: Sequence[str | Path], out: str | Path, metric: str = "final_test_acc") -> Path:
    """Draw `metric` against density for runs or globs of runs into the image `out`, atomically; returns its path.

    The density axis is logarithmic, dense on the left; a dashed line marks an experiment's dense level; the band is
    one sample standard deviation over seeds either side. A level of density 0 has no place there and is named below.
    Raises UserError for an unknown metric or image type and when there is nothing to draw.
    """
    from matplotlib.figure import Figure

    out = Path(out)
    curves = _curves(run_dirs, metric)
    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if out.suffix.lower().lstrip(".") not in kinds:
        raise UserError(f"{out}: unknown image type {out.suffix!r}; end the name in .png, .pdf or .svg")
    axes = figure.add_subplot()
    for number, (label, table) in enumerate(curves):
        _draw(axes, label, table[table["density"] > 0], f"C{number % 10}")
    densities = sorted({d for _, table in curves for d in table["density"] if d > 0}, reverse=True)
    _dress(axes, densities, metric, empty=sum(int((table["density"] <= 0).sum()) for _, table in curves))
    with atomic.replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix.lower().lstrip("."))
    return out


def _curves(run_dirs: Sequence[str | Path], metric: str) -> list[tuple[str, pd.DataFrame]]:
    if metric not in BY_NAME or BY_NAME[metric].kind is not float:
        known = ", ".join(name for name, column in BY_NAME.items() if column.kind is float)
        raise UserError(f"cannot plot {metric!r}; plot one of {known}")
    curves = [(label, over_seeds(rows, metric)) for label, rows in experiments(read_runs(run_dirs))]
    curves = [(label, table) for label, table in curves if (table["density"] > 0).any()]
    if not curves:
        raise UserError(f"nothing to plot: no finished level above density 0 has a {metric}")
    return curves


def _draw(axes: Axes, label: str, table: pd.DataFrame, color: str) -> None:
    runs = int(table["runs"].max())
    if runs > 1:
        label += f", {runs} seeds"
        spread = table["sd"].fillna(0.0)
        axes.fill_between(
            table["density"], table["mean"] - spread, table["mean"] + spread, color=color, alpha=0.2, lw=0
        )
    axes.plot(table["density"], table["mean"], color=color, marker="o", markersize=4, label=label)
    for dense in table.loc[table["density"] == 1.0, "mean"]:
        axes.axhline(dense, color=color, linestyle="--", linewidth=0.8, alpha=0.7)


def _dress(axes: Axes, densities: list[float], metric: str, empty: int) -> None:
    axes.set_xscale("log", base=2)
    low, high = densities[-1], densities[0]
    axes.set_xlim(high * 1.08, low / 1.08)
    ticks = densities if len(densities) <= MAX_TICKS else _halves(low, high)
    axes.set_xticks(ticks, [f"{100 * density:.3g}%" for density in ticks])
    axes.minorticks_off()
    note = f" ({empty} level{'s' * (empty > 1)} at density 0 not shown)" if empty else ""
    axes.set_xlabel(f"density: kept / prunable weights{note}")
    axes.set_ylabel(BY_NAME[metric].help.partition(";")[0].partition(", percent")[0] + _unit(metric))
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small")


def _unit(metric: str) -> str:
    return " (%)" if BY_NAME[metric].high == 100.0 else ""


def _halves(low: float, high: float) -> list[float]:
    """1, 1/2, 1/4, ... within the axis, thinned until they fit."""
    powers = [2.0**-k for k in range(64) if low <= 2.0**-k <= high] or [high, low]
    while len(powers) > MAX_TICKS:
        powers = powers[::2]
    return powers
