"""Console tables: aligned, plain ASCII, empty columns left out."""

from __future__ import annotations

from typing import Any

from utils.reporting.table import levels_table


def row(**changes: Any) -> dict[str, Any]:
    return {"run": "a", "level": 0, "density": 1.0, "kept_weights": 269824, "epochs": 8, **changes}


def test_columns_line_up_to_the_right() -> None:
    text = levels_table([row(final_test_acc=97.5), row(level=10, density=0.8**10, kept_weights=5, final_test_acc=7.0)])
    assert text.isascii()
    head, rule, first, last = text.splitlines()
    assert head.split() == ["level", "density", "kept", "epochs", "test", "%"]
    assert len({len(line) for line in (head, rule, first, last)}) == 1
    assert first.split() == ["0", "1", "269824", "8", "97.50"]
    assert last.split() == ["10", "0.1074", "5", "8", "7.00"]


def test_a_column_empty_everywhere_is_left_out_and_elsewhere_dashed() -> None:
    text = levels_table([row(val_acc=None, train_loss=None), row(level=1, val_acc=None, train_loss=0.5)])
    assert "val" not in text
    assert text.splitlines()[2].split()[-1] == "-"
    assert text.splitlines()[3].split()[-1] == "0.5000"


def test_several_runs_are_told_apart() -> None:
    text = levels_table([row(), row(run="longer name")])
    assert text.splitlines()[0].startswith("run          level")
    assert [line[:11].rstrip() for line in text.splitlines()[2:]] == ["a", "longer name"]


def test_no_rows_say_so() -> None:
    assert levels_table([]) == "no level is finished yet"
