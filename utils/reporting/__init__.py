"""Levels' rows to levels.csv, tables and plots. Imports neither levels nor training; pandas and matplotlib on use."""

from __future__ import annotations

from utils.reporting.columns import COLUMNS, Column, checked
from utils.reporting.plot import plot_levels
from utils.reporting.rows import read_row, read_rows, rebuild
from utils.reporting.runs import experiments, find_runs, over_seeds, read_runs
from utils.reporting.table import levels_table

__all__ = [
    "COLUMNS",
    "Column",
    "checked",
    "experiments",
    "find_runs",
    "levels_table",
    "over_seeds",
    "plot_levels",
    "read_row",
    "read_rows",
    "read_runs",
    "rebuild",
]
