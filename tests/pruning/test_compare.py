"""How far two masks agree, against hand-made masks and sets of places."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.masks import Masks
from utils.pruning.compare import Agreement, compare, compare_table, total
from utils.system.errors import UserError


def masks(**rows: list[int]) -> Masks:
    return Masks({f"{name}.weight": torch.tensor([row], dtype=torch.bool) for name, row in rows.items()})


A = masks(conv=[1, 1, 1, 0, 0, 0, 0, 1], fc=[0, 0], head=[1, 1, 1, 1])
B = masks(conv=[0, 1, 1, 1, 0, 0, 0, 0], fc=[0, 0], head=[1, 1, 1, 1])


def test_layers_and_total_by_hand() -> None:
    rows = compare(A, B)
    assert rows == [
        Agreement("conv.weight", 8, 4, 3, 2),
        Agreement("fc.weight", 2, 0, 0, 0),
        Agreement("head.weight", 4, 4, 4, 4),
    ]
    assert [row.jaccard for row in rows] == [2 / 5, 1.0, 1.0]
    assert [row.hamming for row in rows] == [3, 0, 0]
    assert [row.expected for row in rows] == [1.5, 0.0, 4.0]
    whole = total(rows)
    assert whole == Agreement("total", 14, 8, 7, 6)
    assert (whole.jaccard, whole.hamming, whole.expected) == (6 / 9, 3, 4.0)


def test_the_table() -> None:
    lines = [line.split() for line in compare_table(compare(A, B)).splitlines()]
    assert " ".join(lines[0]) == "parameter weights kept a kept b both by chance jaccard hamming share"
    assert lines[1] == ["conv.weight", "8", "4", "3", "2", "1.5", "0.4000", "3", "0.3750"]
    assert lines[2] == ["fc.weight", "2", "0", "0", "0", "0.0", "1.0000", "0", "0.0000"]
    assert lines[4] == ["total", "14", "8", "7", "6", "4.0", "0.6667", "3", "0.2143"]
    assert len(lines) == 5


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_against_sets_of_places(pairs: list[tuple[bool, bool]]) -> None:
    first = {place for place, (here, _) in enumerate(pairs) if here}
    second = {place for place, (_, there) in enumerate(pairs) if there}
    a, b = (masks(fc=[int(place in kept) for place in range(len(pairs))]) for kept in (first, second))
    (row,) = compare(a, b)
    assert (row.kept_a, row.kept_b, row.both) == (len(first), len(second), len(first & second))
    assert row.hamming == len(first ^ second)
    assert row.jaccard == (len(first & second) / len(first | second) if first | second else 1.0)


def test_chance_is_what_random_masks_share() -> None:
    torch.manual_seed(0)
    shared = []
    for _ in range(2000):
        a, b = (torch.zeros(1, 20, dtype=torch.bool) for _ in range(2))
        a[0, torch.randperm(20)[:5]] = True
        b[0, torch.randperm(20)[:8]] = True
        (row,) = compare(Masks({"w": a}), Masks({"w": b}))
        shared.append(row.both)
    assert row.expected == 2.0
    assert sum(shared) / 2000 == pytest.approx(2.0, abs=0.1)  # standard error 0.022


def test_the_order_of_entries_does_not_matter() -> None:
    turned = Masks({name: B[name] for name in reversed(list(B))})
    assert compare(A, turned) == compare(A, B)


def test_masks_of_different_models_are_refused() -> None:
    for other in (masks(conv=[1] * 8), masks(conv=[1] * 8, fc=[1, 1], head=[1] * 4, more=[1])):
        with pytest.raises(UserError, match=r"'(fc|more).weight' is in one of the masks only"):
            compare(A, other)
    with pytest.raises(UserError, match=r"'fc.weight' has shapes \(1, 2\) and \(1, 3\)"):
        compare(A, masks(conv=[1] * 8, fc=[1, 1, 1], head=[1] * 4))


def test_nothing_to_compare() -> None:
    empty = Masks({})
    assert compare(empty, empty) == []
    assert total([]) == Agreement("total", 0, 0, 0, 0)
    assert compare_table([]).splitlines()[-1].split() == [
        "total",
        "0",
        "0",
        "0",
        "0",
        "0.0",
        "1.0000",
        "0",
        "0.0000",
    ]
