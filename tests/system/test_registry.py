"""Registries: runtime entries and the names read from source agree, and mistakes get the nearest name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from utils.data.datasets import dataset
from utils.models import model
from utils.pruning.allocations import allocation
from utils.pruning.criteria import criterion
from utils.pruning.dynamic import dynamic
from utils.pruning.graphs import graph
from utils.pruning.structured.scores import channel_criterion
from utils.pruning.triggers import trigger
from utils.system.errors import UserError
from utils.system.registry import HOMES, Registry, declared, nearest
from utils.training.optimizers import optimizer
from utils.training.schedules import schedule

ROOT = Path(__file__).resolve().parents[2]
ALL = (dataset, model, allocation, criterion, channel_criterion, graph, trigger, dynamic, optimizer, schedule)
REGISTRIES = {r.kind: r for r in ALL}


@pytest.mark.parametrize("kind", HOMES)
def test_names_read_from_source_are_those_registered(kind: str) -> None:
    assert sorted(declared(kind)) == REGISTRIES[kind].names()
    assert all(declared(kind).values()), "every entry has a docstring"


def test_declared_imports_no_torch() -> None:
    code = "import sys; from utils.system.registry import *; [*map(declared, HOMES)]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown criterion 'magnitud'; did you mean 'magnitude'"):
        _ = criterion["magnitud"]
    assert nearest("zzzz", ["a", "b"]) == "; known: a, b"


def test_the_same_name_from_two_modules_is_refused() -> None:
    registry: Registry = Registry("criterion")
    registry("mine")(lambda: 0)
    other = type("other", (), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="registered twice"):
        registry("mine")(other)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="HOMES"):
        Registry("flavour")
