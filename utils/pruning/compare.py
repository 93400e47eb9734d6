"""How far two masks of one model agree, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.masks import Masks
from utils.pruning.report import aligned
from utils.system.errors import UserError


@dataclass(frozen=True)
class Agreement:
    """One layer, or all together.

    kept_a, kept_b, both: weights kept by the one, the other, and both of them.
    """

    name: str
    numel: int
    kept_a: int
    kept_b: int
    both: int

    @property
    def jaccard(self) -> float:
        """Kept by both over kept by either; 1.0 where neither keeps anything."""
        either = self.kept_a + self.kept_b - self.both
        return self.both / either if either else 1.0

    @property
    def hamming(self) -> int:
        """Weights that one keeps and the other does not."""
        return self.kept_a + self.kept_b - 2 * self.both

    @property
    def expected(self) -> float:
        """Weights two independent random masks of these counts would both keep, on average."""
        return self.kept_a * self.kept_b / self.numel if self.numel else 0.0


def compare(a: Masks, b: Masks) -> list[Agreement]:
    """A row for every entry, in the order of `a`. Raises UserError for masks of different parameters or shapes."""
    for name in [*a, *b]:
        if name not in a or name not in b:
            raise UserError(f"{name!r} is in one of the masks only; compare masks of one model")
        if a[name].shape != b[name].shape:
            shapes = f"{tuple(a[name].shape)} and {tuple(b[name].shape)}"
            raise UserError(f"{name!r} has shapes {shapes}; compare masks of one model")
    return [
        Agreement(name, mask.numel(), a.counts[name], b.counts[name], int((mask & b[name]).sum()))
        for name, mask in a.items()
    ]


def total(rows: Sequence[Agreement]) -> Agreement:
    """All layers together, as one row called `total`: `expected` is then that of masks random over the whole model."""
    return Agreement(
        "total",
        sum(row.numel for row in rows),
        sum(row.kept_a for row in rows),
        sum(row.kept_b for row in rows),
        sum(row.both for row in rows),
    )


def compare_table(rows: Sequence[Agreement]) -> str:
    """The rows of `compare` and their total as aligned text without a final newline.

    Columns: weights, those kept by a, by b, by both, the number both would keep by chance, Jaccard index, Hamming
    distance and its share of the weights.
    """
    lines = [["parameter", "weights", "kept a", "kept b", "both", "by chance", "jaccard", "hamming", "share"]]
    for row in [*rows, total(rows)]:
        counts = [f"{count:,}" for count in (row.numel, row.kept_a, row.kept_b, row.both)]
        share = row.hamming / row.numel if row.numel else 0.0
        lines.append(
            [row.name, *counts, f"{row.expected:,.1f}", f"{row.jaccard:.4f}", f"{row.hamming:,}", f"{share:.4f}"]
        )
    return aligned(lines, "<>>>>>>>>")
