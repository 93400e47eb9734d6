"""Allocations: how many of the kept weights each layer gets.

An allocation is a function `(layers, keep) -> pools`: it splits the layers into pools whose weights compete with each
other and gives each pool its exact count, `keep` in total, never more than a pool has live weights and never less than
its layers' floors (`Layer.floor`). One pool of all layers is `global`; one pool per layer is a layer-wise allocation,
and `spread` makes it of one number per layer. `choose` does the rest: it fixes the layers of `pruning.layer_densities`
and the dense ones beforehand, selects, and checks.

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
    """One pool per layer, counts in proportion to `shares` between each layer's floor and its live weights (`fill`)."""
    counts = fill(keep, shares, [layer.alive for layer in layers], [layer.floor for layer in layers])
    return [Pool((layer,), count) for layer, count in zip(layers, counts, strict=True)]


def fill(
    keep: int, shares: Sequence[int | Fraction], caps: Sequence[int], floors: Sequence[int] | None = None
) -> list[int]:
    """Whole counts that add up to `keep`: clamp(c * share, floor, cap) with one factor c for all, then rounded.

    So what a full layer cannot hold and what a floor costs is shared by all others in proportion. Rounding is by
    largest remainder; the remainders' ties go to the earlier layer. Exact rational arithmetic. floors: all 0 when None.
    Raises ValueError when `keep` is less than the floors or more than the caps (of layers with a share) hold.
    """
    floors = [0] * len(caps) if floors is None else list(floors)
    bounds = list(zip(shares, caps, floors, strict=True))
    least, most = sum(floors), sum(cap if share else floor for share, cap, floor in bounds)
    if keep < least:
        raise ValueError(f"{keep} weights are fewer than the {least} of the floors")
    if keep > most:
        raise ValueError(f"{keep} weights do not fit in layers that hold {most}")
    factor = _factor(keep, shares, caps, floors)
    quotas = [max(Fraction(floor), min(Fraction(cap), factor * share)) for share, cap, floor in bounds]
    counts = [quota.numerator // quota.denominator for quota in quotas]
    by_remainder = sorted(range(len(caps)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: keep - sum(counts)]:
        counts[i] += 1
    return counts


def _factor(keep: int, shares: Sequence[int | Fraction], caps: Sequence[int], floors: Sequence[int]) -> Fraction:
    """The c for which the clamped c * share add up to `keep`: their sum rises in straight lines between its bends."""
    bends: list[tuple[Fraction, int | Fraction]] = []
    for share, cap, floor in zip(shares, caps, floors, strict=True):
        if share and cap > floor:
            bends += [(Fraction(floor) / share, share), (Fraction(cap) / share, -share)]
    bends.sort(key=lambda bend: bend[0])
    factor, reached, slope = Fraction(0), Fraction(sum(floors)), Fraction(0)
    for bend, change in bends:
        after = reached + slope * (bend - factor)
        if after >= keep:
            break
        factor, reached, slope = bend, after, slope + change
    return factor + (keep - reached) / slope if slope else factor
