"""`python -m benchmarks.gpu`: everything that is measured on one GPU, one command after another.

Each has a time limit of its own; one that fails or takes too long is told of at the end and does not keep the others
from running. Their CSVs go to folders of their own under --out. Exit code 1 where a command did not end well.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --dry-run
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.processes import ROOT
from utils.system.cpus import allowed_cpus

LARGE = "--model torchvision/resnet50 --size 224 --classes 1000"


@dataclass(frozen=True)
class Part:
    """A measurement. words: of its command after `python -m`; limit: seconds it may take."""

    name: str
    words: str
    limit: int


PARTS = (
    Part("matrix", "benchmarks.matrix --device cuda --limit 480", 720),
    Part("step-resnet50", f"benchmarks.step --device cuda {LARGE} --batch 256", 300),
    Part("step-cifar", "benchmarks.step --device cuda --model cifar/resnet18 --batch 512", 180),
    Part("select", "benchmarks.select --device cuda", 180),
    Part("prune", f"benchmarks.prune --device cuda {LARGE} --pairs 1", 600),
    Part("trainer", "benchmarks.trainer --device cuda --rounds 5", 1800),
    Part("loader", f"benchmarks.loader --workers {min(16, allowed_cpus())} --device cuda --rounds 5", 600),
)


def command(part: Part, out: Path) -> list[str]:
    """The whole command of a part."""
    return [sys.executable, "-m", *shlex.split(part.words), "--out", str(out / part.name)]


def run(words: Sequence[str], limit: float) -> str:
    """Run a command to its end; returns what went wrong, empty for nothing. Past `limit` seconds it is killed.

    It gets a process group of its own, so that the arms it started end with it.
    """
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"took more than {limit:g} s"
        raise
    return f"exit code {code}" if code else ""


def run_all(parts: Iterable[Part], out: Path) -> int:
    """Run the parts in order and tell which did not end well; returns the exit code."""
    wrong = []
    for part in parts:
        print(f"\n=== {part.name}, at most {part.limit} s: python -m {part.words}", flush=True)
        start = time.monotonic()
        trouble = run(command(part, out), part.limit)
        print(f"=== {part.name}: {trouble or 'done'} after {time.monotonic() - start:.0f} s", flush=True)
        if trouble:
            wrong.append(f"{part.name}: {trouble}")
    print("\n" + ("\n".join(["did not run to the end:", *wrong]) if wrong else "all ran to the end"), flush=True)
    return 1 if wrong else 0


def main(arguments: list[str]) -> int:
    """Run or print the commands; 1 where one did not end well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the commands, with their limits, and end")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    parser.add_argument("--out", type=Path, default=measure.OUT / "gpu", help="where the folders of CSVs go")
    given = parser.parse_args(arguments)
    parts, out = [part for part in PARTS if part.name in (given.only or part.name)], given.out.resolve()
    if given.dry_run:
        for part in parts:
            print(f"{shlex.join(command(part, out))}  # at most {part.limit} s")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end what runs then
    return run_all(parts, out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
