"""Tables for a console: plain ASCII, aligned, numbers to the right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def render(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Lines of a table; the first `left` columns are aligned to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [headings, *rows]) for i in range(len(headings))]
    lines = [list(headings), ["-" * width for width in widths], *(list(row) for row in rows)]
    return "\n".join("  ".join(_pad(cells, widths, left)).rstrip() for cells in lines)


def _pad(cells: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    return [
        text.ljust(width) if i < left else text.rjust(width)
        for i, (text, width) in enumerate(zip(cells, widths, strict=True))
    ]


def _significant(value: float) -> str:
    return f"{value:.4g}"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _four(value: float) -> str:
    return f"{value:.4f}"


def _whole(value: float) -> str:
    return f"{value:.0f}"


_SHOWN: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("level", "level", str),
    ("density", "density", _significant),
    ("kept_weights", "kept", str),
    ("epochs", "epochs", str),
    ("train_loss", "train loss", _four),
    ("train_acc", "train %", _two),
    ("val_acc", "val %", _two),
    ("pruned_test_acc", "pruned %", _two),
    ("final_test_acc", "test %", _two),
    ("max_test_acc", "max test %", _two),
    ("test_acc_top5", "top-5 %", _two),
    ("images_per_second", "img/s", _whole),
    ("seconds", "seconds", _whole),
)
"""Column, heading and format. Columns that are empty in every row are left out."""


def levels_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of one or several runs as a table, in the order given; a column `run` leads when there are several."""
    if not rows:
        return "no level is finished yet"
    shown = [entry for entry in _SHOWN if any(row.get(entry[0]) is not None for row in rows)]
    several = len({row["run"] for row in rows}) > 1
    headings = ["run"] * several + [heading for _, heading, _ in shown]
    lines = []
    for row in rows:
        cells = ["-" if row.get(name) is None else form(row[name]) for name, _, form in shown]
        lines.append([str(row["run"])] * several + cells)
    return render(headings, lines, left=int(several))
