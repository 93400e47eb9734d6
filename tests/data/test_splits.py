"""Splits and subsets: stratified, exact in number, seeded, each index once."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.data.splits import balanced, split, subset
from utils.system.errors import UserError

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=200).map(np.array)
SHARES = st.floats(0.0, 0.99)


@given(LABELS, SHARES, st.integers(0, 3))
def test_every_index_is_in_exactly_one_part_and_the_total_is_exact(labels: np.ndarray, val: float, seed: int) -> None:
    train, held_out = split(labels, val, seed)
    assert sorted([*train, *held_out]) == list(range(len(labels)))
    assert len(held_out) == math.floor(val * len(labels) + 0.5)
    for part in (train, held_out):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


@given(LABELS, SHARES)
def test_each_class_gives_its_share_to_within_one(labels: np.ndarray, val: float) -> None:
    _, held_out = split(labels, val, 0)
    total = len(held_out)
    for label in np.unique(labels):
        fair = Fraction(total * int((labels == label).sum()), len(labels))
        assert abs(int((labels[held_out] == label).sum()) - fair) < 1


@given(LABELS, st.data())
def test_a_subset_is_stratified_exact_and_within_its_source(labels: np.ndarray, data: st.DataObject) -> None:
    source, _ = split(labels, 0.2, 1)
    count = data.draw(st.integers(0, len(source)))
    chosen = subset(source, labels, count, 0)
    assert len(chosen) == count
    assert set(chosen) <= set(source)
    assert chosen.dtype == np.int64
    assert (np.diff(chosen) > 0).all()
    for label in np.unique(labels[source]):
        fair = Fraction(count * int((labels[source] == label).sum()), len(source))
        assert abs(int((labels[chosen] == label).sum()) - fair) < 1


def test_largest_remainders_by_hand() -> None:
    labels = np.repeat(
        [0, 1, 2], [7, 8, 15]
    )  # a tenth: 0.7, 0.8, 1.5 of 3 -> floors 0, 0, 1, then 1 and 0 get one each
    _, held_out = split(labels, 0.1, 0)
    assert np.bincount(labels[held_out]).tolist() == [1, 1, 1]


def test_seeds_differ_and_repeat() -> None:
    labels = np.arange(1000) % 10
    first, again, other = (split(labels, 0.1, seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len(set(first) & set(other)) < 50
    assert set(subset(np.arange(1000), labels, 100, 0)) != set(first)


def test_held_out_images_come_from_all_over_the_class() -> None:
    labels = np.zeros(10_000, dtype=np.int64)
    _, held_out = split(labels, 0.5, 0)
    assert abs(held_out.mean() - 5000) < 5 * 10_000 / np.sqrt(12 * 5000)


def test_a_subset_larger_than_the_training_images_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.subset=11 is more than the 10 "):
        subset(np.arange(10), np.zeros(10), 11, 0)


def test_balanced_takes_so_many_of_every_class_in_turns() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 50)
    indices = np.arange(1, 103)
    chosen = balanced(indices, labels, 5, 3)
    assert np.bincount(labels[chosen]).tolist() == [5, 3, 5]
    assert labels[chosen].tolist() == [0, 1, 2] * 3 + [0, 2] * 2
    assert len(set(chosen.tolist())) == 13
    assert 0 not in chosen
    assert balanced(indices, labels, 5, 3).tolist() == chosen.tolist()
    assert set(balanced(indices, labels, 4, 3)) < set(chosen)
    assert set(balanced(indices, labels, 5, 4)) != set(chosen)
