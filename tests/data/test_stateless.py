"""Stateless random numbers: the same from arrays and from plain integers; uniform; independent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.data import stateless

WORD = 0xFFFFFFFFFFFFFFFF


def plain(key: int, index: int, stream: int) -> float:
    """SplitMix64's finaliser applied twice, in Python's own integers."""

    def finalise(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
        return z ^ (z >> 31)

    first = finalise((key + index * 0x9E3779B97F4A7C15) & WORD)
    second = finalise((first + (stream + 1) * 0x9E3779B97F4A7C15) & WORD)
    return (second >> 11) / 2**53


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(0, 300))
def test_arrays_agree_with_plain_integers(key: int, index: int, stream: int) -> None:
    expected = [plain(key, each, stream) for each in (index, 0)]
    assert stateless.uniform(key, np.array([index, 0]), stream).tolist() == expected


def test_numbers_do_not_depend_on_their_neighbours() -> None:
    indices = np.random.default_rng(0).permutation(1000)
    together = stateless.uniform(7, indices, 3)
    apart = np.array([stateless.uniform(7, np.array([index]), 3)[0] for index in indices])
    np.testing.assert_array_equal(together, apart)


@pytest.mark.parametrize("stream", [0, stateless.FLIP, stateless.RRC_AREA + 16 * 9])
def test_numbers_are_uniform(stream: int) -> None:
    n = 200_000
    draws = stateless.uniform(stateless.epoch_key(0, 0, 0), np.arange(n), stream)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert abs(draws.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / n)
    assert abs(draws.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / n)
    counts = np.bincount((draws * 64).astype(int), minlength=64)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 6 * np.sqrt(2 * 63)


def test_streams_epochs_and_neighbours_are_uncorrelated() -> None:
    n = 100_000
    draws = [
        stateless.uniform(stateless.epoch_key(0, 0, epoch), np.arange(n), stream)
        for epoch in (0, 1)
        for stream in (0, 1)
    ]
    draws.append(np.roll(draws[0], 1))
    off_diagonal = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(n)


def test_derive_depends_on_every_part_and_where_parts_end() -> None:
    keys = {
        stateless.derive("order", 0, 0, 1),
        stateless.derive("order", 0, 1, 0),
        stateless.derive("order", 1, 0, 0),
        stateless.derive("epoch", 0, 0, 1),
        stateless.derive("order", 0, 0, 1, ""),
        stateless.derive("order", 1, 23),
        stateless.derive("order", 12, 3),
    }
    assert len(keys) == 7
    assert all(0 <= key < 2**63 for key in keys)


def test_derive_is_the_number_on_record() -> None:
    """Runs are compared across machines and versions: a change here must be meant."""
    assert stateless.derive("order", 3, 1, 4) == 5827328809169398011
