"""`python -m benchmarks.kills`: a run killed dozens of times, against the run that was not.

The long form of tests/faults/test_kills.py, for each number of ranks: one run is left alone; others are killed at
seeded random moments and started again with the same command until they are done, as many as it takes for all shots to
hit. Every finished run is compared with the first, byte for byte, timing columns apart. What happened goes to
hits.jsonl under --out as it happens: the command can be stopped and given again. Prints what was hit, as two tables.
"""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults import jobs, kills

MISSES = 4
"""Times a shot may find the run done before it is given up."""


class Trials:
    """The runs of one number of ranks."""

    def __init__(self, folder: Path, ranks: int, seed: int, count: int | None) -> None:
        self.folder, self.ranks = folder, ranks
        self.log = folder / "hits.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        if self.log.exists():
            self.records = [json.loads(line) for line in self.log.read_text().splitlines()]
        self.shots = kills.shots(seed)[:count]

    def _note(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with open(self.log, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")
        print(f"{self.ranks} ranks: {json.dumps(record)}", flush=True)

    @property
    def hits(self) -> list[dict[str, Any]]:
        """Shots that hit, with what they hit."""
        return [record for record in self.records if "found" in record]

    @property
    def finished(self) -> list[dict[str, Any]]:
        """Runs that were killed and are done, with how they differ from the whole run."""
        return [record for record in self.records if "differs" in record]

    def run(self) -> None:
        """Fire what has not hit yet, then let the last run finish."""
        whole = self._whole()
        missed = collections.Counter(record["missed"] for record in self.records if "missed" in record)
        done = {record["number"] for record in self.hits}
        queue = collections.deque(s for s in self.shots if s.number not in done and missed[s.number] < MISSES)
        while queue:
            shot, root = queue.popleft(), self.folder / f"killed_{len(self.finished)}"
            hit = kills.fire(shot, root, self.ranks)
            if hit is not None:
                self._note(hit.record())
                continue
            self._note({"missed": shot.number, "aim": shot.aim})
            missed[shot.number] += 1
            if missed[shot.number] < MISSES:
                queue.append(shot)
            self._compare(whole, root)
        last = self.folder / f"killed_{len(self.finished)}"
        if last.exists():
            jobs.Job(last, self.ranks).finish(600.0)
            self._compare(whole, last)

    def _whole(self) -> dict[str, Any]:
        job = jobs.Job(self.folder / "whole", self.ranks)
        job.finish(600.0)
        return jobs.everything(job.run)

    def _compare(self, whole: dict[str, Any], root: Path) -> None:
        (run,) = (path for path in root.iterdir() if path.is_dir())
        differs = jobs.differences(jobs.everything(jobs.RunDir(run)), whole)
        # Each hit since the run before this one.
        before = sum(record["kills"] for record in self.finished)
        self._note({"run": root.name, "kills": len(self.hits) - before, "differs": differs})


def tables(trials: Sequence[Trials]) -> str:
    """What was aimed at and what was met, and what came of it, as markdown."""
    lines = ["| aim | kills | what the run was doing when it was hit |", "|---|---|---|"]
    hits = [hit for each in trials for hit in each.hits]
    for aim in kills.AIMS:
        met = collections.Counter(hit["found"] for hit in hits if hit["aim"] == aim)
        text = ", ".join(f"{what} {count}" for what, count in met.most_common())
        lines.append(f"| {aim} | {sum(met.values())} | {text} |")
    lines += [
        "",
        "| ranks | kills | rank 0, last rank, launcher, everything | runs | that differ |",
        "|" + "---|" * 5,
    ]
    for each in trials:
        victims = collections.Counter(hit["victim"] for hit in each.hits)
        split = ", ".join(str(victims[name]) for name in ("rank 0", "last rank", "launcher", "everything"))
        differ = sum(bool(record["differs"]) for record in each.finished)
        lines.append(f"| {each.ranks} | {len(each.hits)} | {split} | {len(each.finished)} | {differ} |")
    slowest = max((hit["left"] for hit in hits if hit["victim"] == "launcher"), default=0.0)
    return "\n".join(lines) + f"\n\nLast worker gone after the launcher was killed: {slowest:.1f} s at most.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the tables; 1 when a run differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="processes per run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--shots", type=int, help="fewer shots than all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/kills"), help="folder of the runs")
    parser.add_argument("--afresh", action="store_true", help="forget what is there")
    args = parser.parse_args(argv)
    trials = []
    for ranks in args.ranks:
        folder = args.out.resolve() / f"ranks_{ranks}"
        if args.afresh:
            shutil.rmtree(folder, ignore_errors=True)
        trials.append(Trials(folder, ranks, args.seed, args.shots))
        begin = time.monotonic()
        trials[-1].run()
        print(f"{ranks} ranks: {time.monotonic() - begin:.0f} s", flush=True)
    print(tables(trials))
    return 1 if any(record["differs"] for each in trials for record in each.finished) else 0


if __name__ == "__main__":
    sys.exit(main())
