"""What a person sees: one line per epoch and level, a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Console:
    """Prints on the main process, and nothing anywhere else."""

    def __init__(self, main: bool = True) -> None:
        self.main = main
        self._header: tuple[str, ...] | None = None

    def line(self, text: str = "") -> None:
        """One line of text, flushed."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """One line on stderr."""
        if self.main:
            tqdm.write(f"sieve: warning: {text}", file=sys.stderr)

    def row(self, columns: Sequence[tuple[str, str]]) -> None:
        """One table line of (heading, value); the headings are printed again when they change."""
        heading = tuple(name for name, _ in columns)
        widths = [max(len(name), 9) for name in heading]
        if heading != self._header:
            self._header = heading
            self.line("  ".join(name.rjust(width) for name, width in zip(heading, widths, strict=True)))
        self.line("  ".join(value.rjust(width) for (_, value), width in zip(columns, widths, strict=True)))

    def restart_table(self) -> None:
        """Print the headings again before the next row."""
        self._header = None

    def progress(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """`items`, with a bar when the output is a terminal."""
        if not (self.main and sys.stdout.isatty()):
            return iter(items)
        return iter(tqdm(items, total=total, desc=label, leave=False, dynamic_ncols=True))


def number(value: Any, digits: int = 2) -> str:
    """`value` for a table: `-` for None, fixed digits for floats."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
