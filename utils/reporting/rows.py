"""Rows of finished levels, and levels.csv made of them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from utils.reporting.columns import COLUMNS, cell, checked
from utils.system import atomic
from utils.system.errors import UserError
from utils.system.json_file import read_json
from utils.system.rundir import RunDir

Row = dict[str, Any]


def read_row(path: str | Path) -> Row:
    """The checked row in one row.json. Raises UserError naming the file when it is not one."""
    path = Path(path)
    try:
        content = read_json(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({_brief(error)}); delete it to run its level again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no row; delete it to run its level again")
    return checked(content, str(path))


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())


def read_rows(run: RunDir) -> list[Row]:
    """Rows of the levels that are done, sorted by level. Raises UserError for a row of another level."""
    rows = []
    for number in run.levels():
        path = run.level(number).row
        if not path.exists():
            continue
        row = read_row(path)
        if row["level"] != number:
            raise UserError(f"{path}: belongs to level {row['level']}, not {number}; delete it to run the level again")
        rows.append(row)
    return rows


def csv_text(rows: list[Row]) -> str:
    """levels.csv for checked rows: a header, then one line per row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.name for column in COLUMNS])
    writer.writerows([cell(row[column.name]) for column in COLUMNS] for row in rows)
    return out.getvalue()


def rebuild(run: RunDir) -> list[Row]:
    """Write levels.csv, atomically, from the rows that are there; returns them.

    Tasks of an array do so at the same time. Each looks again once it has written: whoever writes last has seen the
    row of everybody who wrote before, so none is lost.
    """
    rows = read_rows(run)
    while True:
        atomic.write_text(run.levels_csv, csv_text(rows))
        written, rows = rows, read_rows(run)
        if rows == written:
            return rows
