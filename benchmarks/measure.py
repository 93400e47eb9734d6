"""What the measurements share: interleaved pairs, medians, targets, one table and one CSV each.

A shared machine speeds up and slows down from minute to minute, so nothing is measured alone: an arm and its
peer run in turn, each pair gives one ratio, and the median of the ratios is the result. The spread beside it says how
far the pairs disagree. Correctness gates come before any figure; one that fails ends the measurement with exit code 1.

    report = Report("loader", packages=("ffcv", "numba"))
    report.gate("decoded crops equal the crop of the whole image", worst == 0, f"largest difference {worst}")
    report.add(faster("jpg 500 q90", "sieve", "ffcv", interleave(ours, theirs, rounds=9), ">= 2.0", work=512))
    raise SystemExit(report.finish())
"""

from __future__ import annotations

import csv
import importlib.metadata
import math
import operator
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from utils.system import atomic
from utils.system.cpus import allowed_cpus

if TYPE_CHECKING:
    import torch

OUT = Path(__file__).resolve().parent / "out"
"""Where CSVs go unless a measurement is told otherwise."""

Clock = Callable[[], float]
Work = Callable[[], "float | None"]
"""One run of an arm: it returns its own cost in seconds, or None and is timed by the clock."""


@dataclass(frozen=True)
class Pairs:
    """Costs of an arm and its peer, in seconds, pair by pair in the order they ran."""

    arm: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def costs(self) -> list[float]:
        """Arm over peer of every pair: below 1 the arm is cheaper."""
        return [one / other for one, other in zip(self.arm, self.peer, strict=True)]

    @property
    def gains(self) -> list[float]:
        """Peer over arm of every pair: above 1 the arm is faster."""
        return [other / one for one, other in zip(self.arm, self.peer, strict=True)]


def interleave(arm: Work, peer: Work, rounds: int, warm_up: int = 1, clock: Clock = time.perf_counter) -> Pairs:
    """Run both in turn `rounds` times, after `warm_up` runs of each that are not counted.

    Every second pair begins with the peer, so that neither always finds the caches and the clock speed the other left.
    `clock` is `time.process_time` where only this process's own CPU time shall count. Raises ValueError for a cost that
    is not a positive number.
    """
    for _ in range(warm_up):
        arm()
        peer()
    arms: list[float] = []
    peers: list[float] = []
    for number in range(rounds):
        order = ((arm, arms), (peer, peers))
        for work, costs in order if number % 2 == 0 else reversed(order):
            costs.append(cost(work, clock))
    return Pairs(tuple(arms), tuple(peers))


def cost(work: Work, clock: Clock = time.perf_counter) -> float:
    """Seconds one run takes. Raises ValueError unless that is a positive number."""
    start = clock()
    own = work()
    seconds = clock() - start if own is None else own
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"a run took {seconds} seconds; give it more work")
    return seconds


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and half the distance between the quartiles, of at least one value."""
    middle = statistics.median(values)
    if len(values) == 1:
        return middle, 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (high - low) / 2


_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


def meets(target: str, value: float) -> bool | None:
    """Whether `value` meets a target such as ">= 1.3"; None for an empty one. Raises ValueError for anything else."""
    if not target:
        return None
    found = re.fullmatch(r"(>=|<=|==|>|<)\s*([0-9][0-9.,_e+-]*)(?:\s.*)?", target)
    if found is None:
        raise ValueError(f"target {target!r} is not a comparison with a number, such as '>= 1.3'")
    return bool(_COMPARISONS[found[1]](value, float(found[2].replace(",", "").replace("_", ""))))


@dataclass(frozen=True)
class Row:
    """One measurement: the columns of the CSV, `hardware` and `versions` apart.

    ratio       median over the pairs; None where there is no peer
    spread      half the distance between their quartiles
    target      comparison the ratio has to meet, or where there is no peer the figure `arm_value`
    met         whether it does; None without a target
    *_value     median of each side in `unit`
    """

    measurement: str
    arm: str
    peer: str
    ratio: float | None
    spread: float | None
    target: str
    met: bool | None
    arm_value: float | None = None
    peer_value: float | None = None
    unit: str = ""
    pairs: int = 0


def cheaper(measurement: str, arm: str, peer: str, pairs: Pairs, target: str = "", unit: str = "s") -> Row:
    """A row whose ratio is the arm's cost over the peer's; `unit` is "s" or "ms", of one run, or "MB" of bytes."""
    scale = {"s": 1.0, "ms": 1e3, "MB": 1e-6}[unit]
    values = statistics.median(pairs.arm) * scale, statistics.median(pairs.peer) * scale
    return _row(measurement, arm, peer, pairs.costs, target, values, unit)


def faster(
    measurement: str, arm: str, peer: str, pairs: Pairs, target: str = "", work: float = 1.0, unit: str = "images/s"
) -> Row:
    """A row whose ratio is the arm's speed over the peer's; each run does `work` units of what `unit` counts."""
    values = work / statistics.median(pairs.arm), work / statistics.median(pairs.peer)
    return _row(measurement, arm, peer, pairs.gains, target, values, unit)


def quicker(measurement: str, arm: str, peer: str, pairs: Pairs, target: str = "", unit: str = "ms") -> Row:
    """A row whose ratio is the peer's cost over the arm's, 2 for twice as fast; `unit` is "s" or "ms", of one run."""
    costs = cheaper(measurement, arm, peer, pairs, unit=unit)
    assert costs.arm_value is not None
    assert costs.peer_value is not None
    return _row(measurement, arm, peer, pairs.gains, target, (costs.arm_value, costs.peer_value), unit)


def _row(
    measurement: str, arm: str, peer: str, ratios: list[float], target: str, values: tuple[float, float], unit: str
) -> Row:
    ratio, spread = median_and_spread(ratios)
    met = meets(target, ratio)
    return Row(measurement, arm, peer, ratio, spread, target, met, *values, unit, len(ratios))


def figure(measurement: str, arm: str, value: float, unit: str, target: str = "") -> Row:
    """A row without a peer: one number, as bytes or images per second against a fixed target."""
    return Row(measurement, arm, "", None, None, target, meets(target, value), value, None, unit)


class Report:
    """The rows of one measurement, printed as they come and written to OUT/<name>.csv at the end."""

    def __init__(self, name: str, packages: Iterable[str] = (), out: Path | None = None) -> None:
        self.name, self.path = name, (out or OUT) / f"{name}.csv"
        self.rows: list[Row] = []
        self.hardware, self.versions = hardware(), versions(packages)
        print(f"{name}: {self.hardware}; load {_load()}\n{self.versions}", flush=True)

    def gate(self, what: str, passed: bool, detail: str = "") -> None:
        """A correctness check, before any figure is taken. Ends the process with exit code 1 where it failed."""
        told = f" ({detail})" if detail else ""
        if not passed:
            print(f"gate failed: {what}{told}", file=sys.stderr, flush=True)
            raise SystemExit(1)
        print(f"gate: {what}: holds{told}", flush=True)
        self.rows.append(Row(f"gate: {what}", detail, "", None, None, "", True))

    def add(self, row: Row) -> Row:
        """Keep a row and print it."""
        self.rows.append(row)
        print("  ".join(cell for cell in _cells(row) if cell), flush=True)
        return row

    def finish(self) -> int:
        """Print the table, write the CSV; returns the exit code, 0: targets that are missed are told, not punished."""
        measured = [row for row in self.rows if not row.measurement.startswith("gate: ")]
        print("\n" + table(measured) + f"\nload {_load()}", flush=True)
        self.save()
        print(f"written: {self.path}", flush=True)
        return 0

    def save(self) -> None:
        """Write what there is so far to the CSV."""
        names = [field.name for field in fields(Row)]
        head = [*names[:7], "hardware", "versions", *names[7:]]
        with atomic.replacing(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow(head)
            for row in self.rows:
                values = ["" if value is None else value for value in (getattr(row, name) for name in names)]
                writer.writerow([*values[:7], self.hardware, self.versions, *values[7:]])


def table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    head = ("measurement", "arm", "peer", "ratio", "target", "met", "arm's figure", "peer's figure")
    return table_of(head, map(_cells, rows))


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as a markdown table."""
    return "\n".join(_line(cells) for cells in (head, ["---"] * len(head), *rows))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Row) -> list[str]:
    ratio = "" if row.ratio is None else f"{row.ratio:.3f} ± {row.spread:.3f}"
    met = "" if row.met is None else ("yes" if row.met else "NO")
    arm, peer = (
        "" if value is None else f"{value:,.4g} {row.unit}" if value < 1000 else f"{value:,.0f} {row.unit}"
        for value in (row.arm_value, row.peer_value)
    )
    return [row.measurement, row.arm, row.peer, ratio, row.target, met, arm, peer]


def wait(device: torch.device) -> None:
    """Until all that was asked of `device` is done; on a CPU it is."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def settle(device: torch.device) -> None:
    """On a GPU: torch as the harness's processes set it. The published harness leaves cuDNN as it is."""
    if device.type == "cuda":
        import torch

        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def clock(device: torch.device) -> Clock:
    """What costs are measured by: this process's CPU time, on a GPU the wall clock, after a `wait`."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def hardware() -> str:
    """CPU model, how many CPUs this process may use, and the GPUs."""
    import torch

    parts = [f"{_cpu_model()}, {allowed_cpus()} CPUs allowed"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return "; ".join(parts)


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def versions(packages: Iterable[str] = ()) -> str:
    """Python, torch, numpy and `packages`, those that are installed, with their versions."""
    told = [f"python {platform.python_version()}"]
    for name in dict.fromkeys(("torch", "numpy", *packages)):
        try:
            told.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            told.append(f"no {name}")
    return ", ".join(told)


def _load() -> str:
    """How many processes want the CPUs, over the last minute."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
