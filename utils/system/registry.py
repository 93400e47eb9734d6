"""Registries: a decorated function in one file is all it takes to add a method.

`Registry` serves the running program; `declared` reads the same names out of the source with `ast`, so that a
config can be validated and `--help` printed without importing torch.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from utils.system.errors import UserError
from utils.system.imports import uncollected

T = TypeVar("T")

SHOWN = 12
"""How many known names a message lists."""

ROOT = Path(__file__).resolve().parents[2]

HOMES = {
    "criterion": "utils.pruning.criteria",
    "allocation": "utils.pruning.allocations",
    "graph": "utils.pruning.graphs",
    "channel_criterion": "utils.pruning.structured.scores",
    "trigger": "utils.pruning.triggers",
    "dynamic": "utils.pruning.dynamic",
    "model": "utils.models",
    "dataset": "utils.data.datasets",
    "optimizer": "utils.training.optimizers",
    "schedule": "utils.training.schedules",
}
"""Where each kind lives: a package (every module in it is read) or a single module."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered object with the traits its decorator was given."""

    name: str
    value: T
    traits: dict[str, Any] = field(default_factory=dict)


class Registry(Generic[T]):
    """Names to objects of one kind; modules of the kind's home are imported on first use."""

    def __init__(self, kind: str) -> None:
        if kind not in HOMES:
            raise ValueError(f"unknown registry kind {kind!r}; add its home to HOMES")
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}
        self._loaded = False

    def __call__(self, name: str, **traits: Any) -> Callable[[T], T]:
        """Decorator that registers its function under `name`. The name must be a literal: `declared` reads it."""

        def register(value: T) -> T:
            present = self._entries.get(name)
            if present is not None and getattr(present.value, "__module__", 0) != getattr(value, "__module__", 1):
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = Entry(name, value, traits)
            return value

        return register

    def load(self) -> None:
        """Import every module of the kind's home, once."""
        if self._loaded:
            return
        self._loaded = True
        with uncollected():
            home = importlib.import_module(HOMES[self.kind])
            for info in pkgutil.iter_modules(getattr(home, "__path__", [])):
                if not info.name.startswith("_"):
                    importlib.import_module(f"{home.__name__}.{info.name}")

    def entry(self, name: str) -> Entry[T]:
        """The entry called `name`. Raises `UserError` with the nearest known name."""
        self.load()
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, self._entries)}")
        return self._entries[name]

    def __getitem__(self, name: str) -> T:
        return self.entry(name).value

    def __contains__(self, name: object) -> bool:
        self.load()
        return name in self._entries

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self.load()
        return sorted(self._entries)


def nearest(name: str, known: Any) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or the list of them when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    more = ", ..." if len(names) > SHOWN else ""
    return f"; known: {', '.join(names[:SHOWN])}{more}" if names else ""


@functools.cache
def declared(kind: str) -> dict[str, str]:
    """Names declared for `kind` and the first line of each docstring, read from source without importing it."""
    base = ROOT.joinpath(*HOMES[kind].split("."))
    files = sorted(base.glob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    found: dict[str, str] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                found.update(dict.fromkeys(_names(node, kind), summary))
    return dict(sorted(found.items()))


def _names(node: ast.FunctionDef | ast.ClassDef, kind: str) -> list[str]:
    names = []
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == kind:
            first = decorator.args[0] if decorator.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                names.append(first.value)
    return names
