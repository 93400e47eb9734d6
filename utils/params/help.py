"""The text of `--help`: every section and key, and every registered method with its one line."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from utils.params.catalog import Key, keys, sections
from utils.params.parsing import allowed, show
from utils.system.registry import HOMES, declared

_WIDTH = 110

_USAGE = (
    "torchrun [--standalone --nproc-per-node=N] harness.py --config FILE [--config FILE ...] [--section.key=value ...]"
)

_TEXT = """\
usage: {usage}

Sieve trains sparse networks: prune, rewind, train, record, level after level.

Values come from the command line, then from config files (later ones win), then from the defaults below.
Environment variables change nothing. Lists are written 0.5,0.2,0.1 and in files also [0.5, 0.2, 0.1].

examples:
  torchrun --standalone --nproc-per-node=2 harness.py --config configs/quickstart.yaml
  python harness.py --config configs/cifar10/resnet18_lrr.yaml --run.seed=1 --data.root=/data
  python harness.py --config configs/cifar10/resnet20_dense.yaml --config configs/levels/wr.yaml --levels.count=8
  python harness.py --config configs/cifar10/resnet18_lrr.yaml --run.plan=true

options:
  --config FILE   a YAML file of sections; may be repeated, later files win
  --help          this text
"""

_PLURALS = {
    "criterion": "criteria (pruning.criterion)",
    "allocation": "allocations (pruning.allocation)",
    "model": "models (model.name), beside torchvision/<name> and timm/<name>",
    "dataset": "data sets (data.name)",
    "optimizer": "optimizers (optimizer.name)",
    "schedule": "schedules (schedule.name)",
}


def help_text(usage: str = "", options: Mapping[str, str] | None = None) -> str:
    """The whole text. `usage` is how the entry point is called, `options` are its own options with their help."""
    parts = [_TEXT.format(usage=usage or _USAGE)]
    parts[0] += "".join(f"  --{name} VALUE".ljust(18) + f"{text}\n" for name, text in (options or {}).items())
    for section, cls in sections().items():
        lines = [f"{section}: {(cls.__doc__ or '').strip()}"]
        lines += [_entry(key) for key in keys().values() if key.section == section]
        parts.append("\n".join(lines) + "\n")
    for kind in HOMES:
        lines = [f"{_PLURALS.get(kind, kind)}:"]
        lines += [_wrapped(f"  {name}  ".ljust(20), text, 20) for name, text in declared(kind).items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts).rstrip()


def _entry(key: Key) -> str:
    default = show(key, key.default) or "''"
    head = f"  --{key.dotted}={default}"
    return f"{head.ljust(44)} {allowed(key)}\n{_wrapped('      ', key.meta.help, 6)}"


def _wrapped(head: str, text: str, indent: int) -> str:
    return textwrap.fill(head + text, _WIDTH, subsequent_indent=" " * indent, drop_whitespace=True).rstrip()
