"""The schema of levels.csv: order, types, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from utils.reporting.columns import COLUMNS, cell, checked
from utils.system.errors import UserError

PROMISED = [
    "run", "seed", "level", "target_density", "density", "sparsity", "kept_weights", "prunable_weights", "epochs",
    "train_loss", "train_acc", "val_acc", "test_loss", "final_test_acc", "max_test_acc", "test_acc_top5",
    "images_per_second", "seconds", "mask_digest",
]  # fmt: skip


def least_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run": "a-1", "seed": 0, "level": 1, "target_density": 0.8, "density": 0.8, "sparsity": 0.2,
        "kept_weights": 8, "prunable_weights": 10, "epochs": 2, "mask_digest": "ab",
    }  # fmt: skip
    return {**row, **changes}


def test_the_promised_columns_come_in_the_promised_order() -> None:
    names = [column.name for column in COLUMNS]
    assert len(set(names)) == len(names)
    assert [name for name in names if name in PROMISED] == PROMISED
    assert all(column.help for column in COLUMNS)


def test_a_least_row_is_filled_up_in_order() -> None:
    row = checked(dict(reversed(least_row().items())), "here")
    assert list(row) == [column.name for column in COLUMNS]
    assert row["kept_weights"] == 8
    assert row["val_acc"] is None


def test_whole_numbers_become_floats_in_float_columns() -> None:
    density = checked(least_row(density=1), "here")["density"]
    assert isinstance(density, float)
    assert cell(density) == "1.0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"final_test_ac": 1.0}, ["final_test_ac", "did you mean 'final_test_acc'"]),
        ({"kept_weights": None}, ["kept_weights is missing"]),
        ({"kept_weights": 8.0}, ["kept_weights=8.0", "int"]),
        ({"kept_weights": True}, ["kept_weights=True", "int"]),
        ({"seed": "0"}, ["seed='0'", "int"]),
        ({"mask_digest": 5}, ["mask_digest=5", "str"]),
        ({"train_loss": float("nan")}, ["train_loss=nan", "finite"]),
        ({"density": 1.5}, ["density=1.5", "0.0 to 1.0"]),
        ({"final_test_acc": 100.5}, ["final_test_acc=100.5", "100.0"]),
        ({"level": -1}, ["level=-1"]),
    ],
)
def test_wrong_rows_are_refused_by_name(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        checked(least_row(**change), "level_01/row.json")
    message = str(caught.value)
    assert "\n" not in message
    for word in ["level_01/row.json", *words]:
        assert word in message


def test_a_missing_required_column_is_refused() -> None:
    row = least_row()
    del row["mask_digest"]
    with pytest.raises(UserError, match="mask_digest is missing"):
        checked(row, "here")


@pytest.mark.parametrize("value", [0.1 + 0.2, 1 / 3, 1e-17, 5e-324, 99.99999999999999])
def test_floats_keep_all_their_digits(value: float) -> None:
    assert float(cell(value)) == value


def test_none_is_an_empty_cell_and_zero_is_not() -> None:
    assert [cell(None), cell(0), cell(0.0), cell("x")] == ["", "0", "0.0", "x"]
