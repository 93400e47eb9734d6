"""`python -m benchmarks.select`: the exact k-th score of a whole network, and the masks made from it.

Scores of 25.5 million weights (ResNet-50's) and of 100 million, in layers, the best tenth kept; float32, and float64 as
SynFlow's. Peers: torch.kthvalue and torch.sort, on the scores already end to end, and numpy's partition of a copy. The
masks' peer is the usual way: kthvalue, then a comparison per layer, which keeps too many or too few where scores tie.

One thread; costs are CPU time, so that what else the machine does counts as little as can be. With --device cuda the
scores lie on the GPU, as a criterion leaves them there, and costs are wall time until the GPU is done; the way from
scores by name to layers counts. Peers are torch.sort there and, for the first size, torch.kthvalue.

    python -m benchmarks.select
    python -m benchmarks.select --device cuda
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure
from benchmarks.measure import Report
from utils.data.stateless import derive
from utils.pruning import select_on_device
from utils.pruning.kth import kth
from utils.pruning.select import Layer, Pool, layers_of, priority, top

LAYERS = 54
KEPT = 0.1
GATE_SIZE = 300_000
LIMITS = {25_500_000: "<= 90 ms", 100_000_000: "<= 260 ms"}
GPU_LIMITS = {25_500_000: "<= 1 ms"}


class Case:
    """`size` scores in LAYERS layers, of which a share KEPT of the live ones stays.

    levels: draws so many values per standard deviation, 0 for as many as there are. live: the share of live weights.
    """

    def __init__(self, size: int, dtype: type = np.float32, levels: int = 0, live: float = 1.0) -> None:
        rng = np.random.default_rng(0)
        flat = np.abs(rng.standard_normal(size, dtype=np.float32)).astype(dtype)
        self.flat = np.floor(flat * levels) if levels else flat
        self.live = np.ones(size, dtype=bool) if live == 1.0 else rng.random(size) < live
        parts = zip(np.array_split(self.flat, LAYERS), np.array_split(self.live, LAYERS), strict=True)
        self.layers = tuple(
            Layer(f"{i}", scores.shape, scores, mask, derive("ties", 0, f"{i}"))
            for i, (scores, mask) in enumerate(parts)
        )
        self.alive = sum(layer.alive for layer in self.layers)
        self.keep = int(self.alive * KEPT)
        self.rank = self.alive - self.keep

    def threshold(self) -> float:
        """Ours; all weights live, as for the peers."""
        return float(kth([(layer.scores, None) for layer in self.layers], self.alive, self.rank))

    def kthvalue(self) -> float:
        """Torch's, which counts from 1."""
        return float(torch.kthvalue(torch.from_numpy(self.flat), self.rank + 1).values)

    def sort(self) -> float:
        """From a sort of all."""
        return float(torch.sort(torch.from_numpy(self.flat)).values[self.rank])

    def partition(self) -> float:
        """From numpy's partition of a copy."""
        return float(np.partition(self.flat, self.rank)[self.rank])

    def masks(self) -> dict[str, torch.Tensor]:
        """Ours: exactly `keep` weights."""
        return top(Pool(self.layers, self.keep))

    def usual_masks(self) -> list[torch.Tensor]:
        """What scores no less than kthvalue's threshold, however many that are."""
        threshold = self.kthvalue()
        return [torch.from_numpy(layer.scores) >= threshold for layer in self.layers]

    def sorted_mask(self) -> np.ndarray:
        """The mask from an order of all weights: live ones first, then by score, priority and place."""
        order = np.concatenate([priority(layer.key, np.arange(layer.size)) for layer in self.layers])
        mask = np.zeros(len(self.flat), dtype=bool)
        mask[np.lexsort((order, -self.flat, ~self.live))[: self.keep]] = True
        return mask


class DeviceCase:
    """A `Case` whose scores lie on `device`, by name, as a criterion gives them; the masks it starts from do not."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.keep, self.rank, self.device = case.keep, case.rank, device
        self.flat = torch.from_numpy(case.flat).to(device)
        parts = torch.tensor_split(self.flat, LAYERS)
        self.scores = {layer.name: part for layer, part in zip(case.layers, parts, strict=True)}
        self.live = {layer.name: torch.from_numpy(layer.live) for layer in case.layers}

    def threshold(self) -> float:
        """Ours; all weights live, as for the peers."""
        return float(select_on_device.threshold(list(self.scores.values()), self.rank))

    def masks(self) -> dict[str, torch.Tensor]:
        """Ours: exactly `keep` weights."""
        return top(Pool(tuple(layers_of(self.scores, self.live, 0)), self.keep))

    def kthvalue(self) -> float:
        """Torch's, which counts from 1."""
        return float(torch.kthvalue(self.flat, self.rank + 1).values)

    def sort(self) -> float:
        """From a sort of all."""
        return float(torch.sort(self.flat).values[self.rank])

    def histogram(self) -> float:
        """From two counts of the scores' bits, which order numbers that are not negative: upper half, then lower."""
        bits = self.flat.view(torch.int32)
        upper = bits >> 16
        ends = torch.bincount(upper, minlength=1 << 15).cumsum(0)
        found = torch.searchsorted(ends, self.rank, right=True)
        inside = bits[upper == found] & 0xFFFF
        left = self.rank - (ends[found] - len(inside))
        lower = torch.searchsorted(torch.bincount(inside, minlength=1 << 16).cumsum(0), left, right=True)
        return float((found << 16 | lower).int().view(torch.float32))

    def sorted_masks(self) -> list[torch.Tensor]:
        """What scores no less than a sort's threshold, however many that are."""
        threshold = self.sort()
        return [score >= threshold for score in self.scores.values()]


def check(report: Report, size: int, device: torch.device | None = None) -> None:
    """The gates: the masks of a sort to the weight, exact counts, with and without ties and dead weights.

    device: where the scores lie by name; None for layers that are made already.
    """
    equal = Case(size)
    equal.flat[:] = 1.5  # the layers are views of it
    cases = {
        "all scores different": Case(size),
        "float64, a tenth alive": Case(size, np.float64, live=0.1),
        "a dozen values, half alive": Case(size, levels=3, live=0.5),
        "all scores equal": equal,
    }
    for name, case in cases.items():
        masks = case.masks() if device is None else DeviceCase(case, device).masks()
        mask = np.concatenate([part.cpu().numpy() for part in masks.values()])
        wrong = int(np.count_nonzero(mask != case.sorted_mask()))
        report.gate(f"masks as from a sort: {name}", wrong == 0, f"{wrong} of {size} differ")
        report.gate(f"exact count: {name}", int(mask.sum()) == case.keep, f"{mask.sum()} of {case.keep} kept")


def compare(report: Report, name: str, case: Case, rounds: int, limit: str = "") -> None:
    """The rows of one size: the threshold, then the masks. limit: what the threshold may cost."""
    agree = case.threshold() == case.kthvalue()
    report.gate(f"{name}: kthvalue finds the same score", agree, f"{case.threshold()!r}")
    pairs = interleave(case.threshold, case.kthvalue, rounds)
    row = report.add(measure.quicker(f"{name}, k-th score", "sieve", "torch.kthvalue", pairs, ">= 4.5"))
    assert row.arm_value is not None
    report.add(measure.figure(f"{name}, k-th score", "sieve", row.arm_value, "ms", limit))
    pairs = interleave(case.threshold, case.partition, rounds)
    report.add(measure.quicker(f"{name}, k-th score", "sieve", "numpy.partition", pairs))
    pairs = interleave(case.masks, case.usual_masks, rounds)
    report.add(measure.quicker(f"{name}, masks", "sieve", "torch.kthvalue, then >=", pairs, ">= 2.8"))


def compare_sort(report: Report, name: str, case: Case, rounds: int) -> None:
    """The row against a sort, which is slow enough for one size."""
    pairs = interleave(case.threshold, case.sort, rounds)
    report.add(measure.quicker(f"{name}, k-th score", "sieve", "torch.sort", pairs, ">= 35"))


def compare_device(report: Report, name: str, case: DeviceCase, rounds: int, first: bool, limit: str = "") -> None:
    """The rows of one size with scores on a device. first: kthvalue too; limit: what the threshold may cost."""
    agree = case.threshold() == case.sort() == case.histogram()
    report.gate(f"{name}: a sort and a histogram find the same score", agree, f"{case.threshold()!r}")

    def together(arm: Callable[[], object], peer: Callable[[], object]) -> measure.Pairs:
        def timed(work: Callable[[], object]) -> float:
            def whole() -> None:
                work()
                measure.wait(case.device)

            return measure.cost(whole, time.perf_counter)

        return measure.interleave(lambda: timed(arm), lambda: timed(peer), rounds)

    pairs = together(case.threshold, case.sort)
    row = report.add(measure.quicker(f"{name}, k-th score", "sieve", "torch.sort", pairs))
    assert row.arm_value is not None
    report.add(measure.figure(f"{name}, k-th score", "sieve", row.arm_value, "ms", limit))
    pairs = together(case.threshold, case.histogram)
    report.add(measure.quicker(f"{name}, k-th score", "sieve", "histogram of bits", pairs))
    if first:
        pairs = together(case.threshold, case.kthvalue)
        report.add(measure.quicker(f"{name}, k-th score", "sieve", "torch.kthvalue", pairs))
    pairs = together(case.masks, case.sorted_masks)
    row = report.add(measure.quicker(f"{name}, masks", "sieve", "torch.sort, then >=", pairs))
    assert row.arm_value is not None
    report.add(measure.figure(f"{name}, masks", "sieve", row.arm_value, "ms"))


def interleave(arm: Callable[[], object], peer: Callable[[], object], rounds: int) -> measure.Pairs:
    """Both in turn, in CPU time."""

    def timed(work: Callable[[], object]) -> float:
        return measure.cost(lambda: work() and None, time.process_time)

    return measure.interleave(lambda: timed(arm), lambda: timed(peer), rounds)


def main(arguments: list[str]) -> int:
    """Measure and write benchmarks/out/select.csv; 1 where a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.select", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[25.5e6, 100e6], help="weights (25.5e6 100e6)")
    parser.add_argument("--rounds", type=int, default=9, help="pairs a row (default 9)")
    parser.add_argument("--sort-rounds", type=int, default=3, help="pairs against a sort of the first size (default 3)")
    parser.add_argument("--device", default="cpu", help="where the scores lie: cpu or cuda")
    parser.add_argument("--out", type=Path, default=measure.OUT, help="where select.csv goes")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = None if given.device == "cpu" else torch.device(given.device)
    report = Report("select", out=given.out)
    check(report, GATE_SIZE, device)
    for number, size in enumerate(map(int, given.sizes)):
        name, case = f"{size / 1e6:g} million", Case(size)
        if device is not None:
            limit = GPU_LIMITS.get(size, "")
            compare_device(report, f"{name}, {device.type}", DeviceCase(case, device), given.rounds, number == 0, limit)
            continue
        compare(report, name, case, given.rounds, LIMITS.get(size, ""))
        if number == 0:
            compare_sort(report, name, case, given.sort_rounds)
            compare(report, f"{name} in float64", Case(size, np.float64), given.rounds)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
