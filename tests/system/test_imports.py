"""Imports at full speed: when garbage is collected."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from utils.system.imports import uncollected


class Knot:
    """Holds itself: only the garbage collector frees it."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def dropped() -> weakref.ref[Knot]:
    return weakref.ref(Knot())


def test_collects_nothing_within_and_again_after_it() -> None:
    with uncollected():
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the inner one must not end the outer one"
    assert gc.isenabled()


def test_leaves_a_collector_that_was_off_alone() -> None:
    gc.disable()
    with uncollected(forever=True):
        pass
    assert not gc.isenabled()


def test_collects_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), uncollected(forever=True):
        _ = 1 / 0
    assert gc.isenabled()


@pytest.mark.parametrize("forever", [False, True])
def test_what_is_alive_at_the_end_stays_where_that_is_asked_for(forever: bool) -> None:
    gc.collect()
    with uncollected(forever):
        within = dropped()
    after = dropped()
    gc.collect()
    assert after() is None
    assert (within() is not None) == forever
