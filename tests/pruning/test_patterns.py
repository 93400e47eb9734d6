"""Patterns against explicit loops over weights and enumeration of every group's choices."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.stateless import derive
from utils.pruning.patterns import check_text, labels, largest, n_of_m, outside, parse, starved
from utils.pruning.select import Layer
from utils.system.errors import UserError

Shape = tuple[int, ...]


@pytest.mark.parametrize("text", ["weight", "2:4", "1:4", "4:8", "1:2", "block=4x4", "block=1x16", "kernel", "channel"])
def test_patterns_are_read_and_written_alike(text: str) -> None:
    assert str(parse(f" {text} ")) == text
    check_text(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:4", "must keep more than none and fewer than all"),
        ("0:4", "must keep more than none"),
        ("5:4", "must keep more than none"),
        ("block=0x4", "empty side"),
        ("block=4", "is not weight"),
        ("block", "is not weight"),
        ("2:4:8", "is not weight"),
        ("-1:4", "is not weight"),
        ("٢:4", "is not weight"),
        ("channels", "is not weight"),
        ("", "is not weight"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"pruning\.pattern: '.*' .*{message}") as caught:
        check_text(text)
    assert "\n" not in str(caught.value)


def test_what_a_pattern_leaves_whole() -> None:
    shapes: dict[str, Shape] = {"conv": (8, 3, 3, 3), "depthwise": (8, 1, 3, 3), "mid": (4, 8, 1, 1), "fc": (10, 12)}
    assert outside("weight", shapes) == outside("block=4x4", shapes) == outside("kernel", shapes) == ()
    assert outside("2:4", shapes) == ("conv", "depthwise")
    assert outside("4:8", shapes) == ("conv", "depthwise", "fc")
    assert outside("1:3", shapes) == ("depthwise", "mid")
    assert outside("channel", shapes) == ("fc",)
    assert outside("channel", {}) == ()


def members(text: str, shape: Shape) -> set[frozenset[int]]:
    """The groups of a pattern as sets of flat indices, from its description."""
    found: dict[object, set[int]] = defaultdict(set)
    for flat, place in enumerate(itertools.product(*map(range, shape))):
        out, into, position = place[0], (*place, 0)[1], place[2:]
        if text == "kernel":
            key: object = (out, into)
        elif text == "channel":
            key = out
        elif text == "weight":
            key = flat
        elif text.startswith("block="):
            height, width = map(int, text[6:].split("x"))
            key = (out // height, into // width, position)
        else:
            key = (out, into // int(text.split(":")[1]), position)
        found[key].add(flat)
    return {frozenset(group) for group in found.values()}


SHAPES = st.one_of(
    st.tuples(st.integers(1, 5)),
    st.tuples(st.integers(1, 7), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
)


TEXTS = ["weight", "kernel", "channel", "block=2x2", "block=3x1", "block=1x4", "block=20x20", "1:2"]


@given(SHAPES, st.sampled_from(TEXTS))
@settings(max_examples=200, deadline=None)
def test_labels_are_the_described_groups(shape: Shape, text: str) -> None:
    found = labels(parse(text), shape)
    assert found.dtype == np.int32
    assert found.shape == (math.prod(shape),)
    assert set(found.tolist()) == set(range(int(found.max()) + 1))
    groups = {frozenset(np.flatnonzero(found == label).tolist()) for label in range(int(found.max()) + 1)}
    assert groups == members(text, shape)
    assert largest(parse(text), shape) == max(map(len, groups))


@st.composite
def ratios(draw: st.DrawFn) -> tuple[Layer, int, int]:
    m = draw(st.integers(2, 5))
    n = draw(st.integers(1, m - 1))
    shape = draw(st.sampled_from([(2, m), (3, 2 * m), (2, m, 2), (1, 2 * m, 1, 2)]))
    size = math.prod(shape)
    values = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 0.5, math.inf, -math.inf])
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    scores = np.array(draw(st.lists(values, min_size=size, max_size=size)), dtype)
    live = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    for group in members(f"{n}:{m}", shape):  # at least n live weights in every group
        for flat in sorted(group)[:n]:
            live[flat] = True
    return Layer("w", shape, scores, live, derive("ties", draw(st.integers(0, 3)), "w")), n, m


def _place(key: int, index: int) -> int:
    """The documented tie order in plain integers: the top 53 bits of two rounds of SplitMix64."""
    golden, wrap = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
        return x ^ (x >> 31)

    return mix((mix((key + index * golden) & wrap) + golden) & wrap) >> 11


@given(ratios())
@settings(max_examples=200, deadline=None)
def test_n_of_m_is_the_best_of_all_choices_of_every_group(case: tuple[Layer, int, int]) -> None:
    layer, n, m = case
    before = layer.scores.copy(), layer.live.copy()
    mask = n_of_m(layer, n, m)
    assert mask.shape == layer.shape
    kept = set(np.flatnonzero(mask.numpy().reshape(-1)).tolist())
    expected: set[int] = set()
    for group in members(f"{n}:{m}", layer.shape):
        choices = itertools.combinations([i for i in group if layer.live[i]], n)
        worth = {c: sorted(((layer.scores[i], -_place(layer.key, i)) for i in c), reverse=True) for c in choices}
        expected.update(max(worth, key=lambda c: worth[c]))
    assert kept == expected
    assert np.array_equal(layer.scores, before[0])
    assert np.array_equal(layer.live, before[1])


def test_the_key_of_ties_is_that_of_single_weights() -> None:
    digest = hashlib.sha256(b"ties\x1f4\x1fw").digest()
    assert derive("ties", 4, "w") == int.from_bytes(digest[:8], "little") >> 1


def test_a_group_with_too_few_live_weights_is_found() -> None:
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    mask[1, :3, 2] = False
    assert starved(parse("1:4"), {"a": mask}) is None
    assert starved(parse("2:4"), {"a": torch.ones(1, 4, dtype=torch.bool), "b": mask}) == "b"
    layer = Layer("b", (2, 4, 3), np.zeros(24, np.float32), mask.numpy().reshape(-1))
    with pytest.raises(ValueError, match="fewer than 2 live weights"):
        n_of_m(layer, 2, 4)
    with pytest.raises(ValueError, match="4 inputs do not divide by 3"):
        n_of_m(layer, 1, 3)


@pytest.mark.parametrize("seed", range(8))
def test_dead_weights_never_tie_with_live_ones_of_minus_infinity(seed: int) -> None:
    live = np.array([0, 1, 1, 1] * 4, bool)
    layer = Layer("w", (4, 4), np.full(16, -np.inf, np.float32), live, derive("ties", seed, "w"))
    mask = n_of_m(layer, 2, 4).numpy()
    assert mask.sum(axis=1).tolist() == [2] * 4
    assert not mask[:, 0].any()
