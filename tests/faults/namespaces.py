"""Two hosts on one machine for tests, which are skipped where they cannot be made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from benchmarks.hosts import Host, Unavailable, pair

__all__ = ["Host", "hosts"]


@contextlib.contextmanager
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts on one network of their own; skips the test, with the reason, where they cannot be made."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(pair())
        except Unavailable as reason:
            pytest.skip(f"{reason}")
        yield made
