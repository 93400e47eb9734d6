"""Allocations: how many of the kept weights each layer gets.

An allocation is a function `(layers, keep) -> pools`: it splits the layers into pools whose weights compete with each
other and gives each pool its exact count, `keep` in total and never more than a pool has live weights. One pool of all
layers is `global`; one pool per layer is a layer-wise allocation, and `spread` makes it of one number per layer.
The harness does the rest: it fixes the layers of `pruning.layer_densities` beforehand, selects, and checks.

A new allocation is one decorated function in a file of this package:

    @allocation("uniform")
    def uniform(layers, keep):
        return spread(layers, keep, [layer.size for layer in layers])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from utils.pruning.select import Layer, Pool
from utils.system.registry import Registry

Allocation = Callable[[Sequence[Layer], int], Sequence[Pool]]

allocation: Registry[Allocation] = Registry("allocation")


def spread(layers: Sequence[Layer], keep: int, shares: Sequence[int | Fraction]) -> list[Pool]:
    """One pool per layer, counts in proportion to `shares` (see `fill`), each capped at the layer's live weights."""
    counts = fill(keep, shares, [layer.alive for layer in layers])
    return [Pool((layer,), count) for layer, count in zip(layers, counts, strict=True)]


def fill(keep: int, shares: Sequence[int | Fraction], caps: Sequence[int]) -> list[int]:
    """Whole counts that add up to `keep`: min(cap, c * share) with one factor c for all, rounded by largest remainder.

    Layers that c * share would overfill take their cap and hand the rest on, until no layer overflows; the
    remainders' ties go to the earlier layer. Exact rational arithmetic. Raises ValueError when the caps, or the caps of
    the layers whose share is not zero, do not hold `keep`.
    """
    quotas = [Fraction(0)] * len(caps)
    open_layers = [i for i, share in enumerate(shares) if share]
    left = keep
    if not 0 <= keep <= sum(caps[i] for i in open_layers):
        raise ValueError(f"{keep} weights do not fit in layers that hold {sum(caps[i] for i in open_layers)}")
    while open_layers:
        factor = left / sum((Fraction(shares[i]) for i in open_layers), Fraction(0))
        full = {i for i in open_layers if factor * shares[i] >= caps[i]}
        for i in full or open_layers:
            quotas[i] = Fraction(caps[i]) if full else factor * shares[i]
        left -= sum(caps[i] for i in full)
        open_layers = [i for i in open_layers if i not in full] if full else []
    counts = [quota.numerator // quota.denominator for quota in quotas]
    by_remainder = sorted(range(len(caps)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: keep - sum(counts)]:
        counts[i] += 1
    return counts
