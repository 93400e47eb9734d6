"""`python -m utils.pruning.structured table`: which networks of torchvision and timm shrink, as a markdown table.

table [--out FILE] [--seconds N] [NAME ...]   examine one network of every family (or those named), each in a process of
                                              its own that is stopped after N seconds, and write the table
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.system.atomic import write_text
from utils.system.errors import EXIT_BAD_INPUT, UserError

HEAD = """\
| network | shrinks | groups (whole) | MACs | parameters | output | gradient |
|---|---|---|---|---|---|---|
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what `argv` says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m utils.pruning.structured")
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="which networks shrink")
    table.add_argument("names", nargs="*", help="networks; one of every family by default")
    table.add_argument("--out", type=Path, help="markdown file to write")
    table.add_argument("--seconds", type=int, default=150, help="time a network may take")
    one = commands.add_parser("examine", help="one network; prints what was found as JSON")
    one.add_argument("name")
    args = parser.parse_args(argv)
    return _examine(args.name) if args.command == "examine" else _table(args.names, args.out, args.seconds)


def _examine(name: str) -> int:
    from dataclasses import asdict

    from utils.pruning.structured.sweep import examine

    try:
        print(json.dumps(asdict(examine(name))))
    except UserError as error:
        print(f"sieve: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _table(names: Sequence[str], out: Path | None, seconds: int) -> int:
    from utils.pruning.structured.sweep import FAMILIES

    rows, wrong = [], 0
    for name in names or FAMILIES:
        row, failed = _row(name, seconds)
        wrong += failed
        print(row, flush=True)
        rows.append(row)
    shrinking = sum(row.split("|")[2].strip() == "yes" for row in rows)
    text = HEAD + "\n".join(rows) + f"\n\n{shrinking} of {len(rows)} shrink.\n"
    if out is not None:
        write_text(out, text)
    print(f"{shrinking} of {len(rows)} shrink")
    return 1 if wrong else 0


def _row(name: str, seconds: int) -> tuple[str, bool]:
    """The network's line, and whether something went wrong that is no refusal."""
    command = [sys.executable, "-m", "utils.pruning.structured", "examine", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"| `{name}` | no: it takes more than {seconds} s | | | | | |", False
    last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("sieve: ")
    if done.returncode == EXIT_BAD_INPUT:
        reason = last.removeprefix(f"structured pruning of {name}: ").replace("|", "/")
        return f"| `{name}` | no: {reason} | | | | | |", False
    if done.returncode:
        return f"| `{name}` | no: {last[:160].replace('|', '/')} | | | | | |", True
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return (
        f"| `{name}` | yes | {found['groups']} ({found['whole']}) | {found['macs']:.2f} | {found['parameters']:.2f} | "
        f"{found['output']:.0e} | {found['gradient']:.0e} |"
    ), False


if __name__ == "__main__":
    sys.exit(main())
