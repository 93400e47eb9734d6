"""Resident memory of a whole pruning, selection and masks included, in copies of the weights; one process each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import gc
import sys

import torch
from torch import nn

from utils.masks import Masks
from utils.params.pruning import Pruning
from utils.pruning import PruningHarness

OPTIONS = {"ntk_sap": ("draws=2", "samples=4")}


def field(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])


def copies(side, name, start, goal, rounds):
    torch.manual_seed(0)
    width = side * side
    layers = [layer for _ in range(8) for layer in (nn.Linear(width, width), ACTIVATION())]
    model = nn.Sequential(nn.Flatten(), *layers)
    section = Pruning(criterion=name, density=goal, rounds=rounds, criterion_options=OPTIONS.get(name, ()))
    harness = PruningHarness(section, seed=0, input_shape=(1, side, side))
    batches = [(torch.randn(2, 1, side, side), torch.tensor([1, 2])) for _ in range(2)]
    masks = Masks({n: torch.rand(m.shape) < start for n, m in Masks.dense(model).items()}) if start < 1 else None
    one = sum(p.numel() * p.element_size() for p in model.parameters())
    own = 0 if masks is None else sum(m.numel() for m in masks.values())
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = field("VmRSS")
    pruned = harness.prune(model, masks, goal, batches).masks
    assert pruned.kept == int(goal * pruned.total + 0.5)
    return (one + own + field("VmHWM") - before) / one


name, activation, start, goal, rounds = sys.argv[1:]
ACTIVATION = getattr(nn, activation)
plan = name, float(start), float(goal), int(rounds)
copies(8, *plan)  # whatever is allocated once
print(copies(40, *plan))
"""


def copies(*words: object) -> float:
    """Peak of one pruning of 8 layers of 2.56M float32 weights, in copies of them: weights and masks included."""
    # Large blocks come and go with mmap, so that what is freed is not resident.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", WORKER, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout)


@pytest.fixture(autouse=True)
def _linux() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of resident memory cannot be reset here")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most"),
    [("magnitude", 4), ("random", 4), ("snip", 4), ("taylor", 4), ("fisher", 4), ("synflow", 6), ("grasp", 8),
     ("crop", 8), ("ntk_sap", 8)],
)  # fmt: skip
def test_one_round_from_the_dense_network(name: str, most: int) -> None:
    found = copies(name, "ReLU", 1.0, 0.3, 1)
    assert 2 < found <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most"), [("snip", 4), ("fisher", 4), ("synflow", 6), ("grasp", 8), ("crop", 8), ("ntk_sap", 8)]
)
@pytest.mark.parametrize(("start", "goal", "rounds"), [(0.5, 0.25, 1), (1.0, 0.1, 2)])
def test_masks_that_prune_already_add_what_they_hold_aside(
    name: str, most: int, start: float, goal: float, rounds: int
) -> None:
    assert copies(name, "ReLU", start, goal, rounds) <= most


@pytest.mark.slow
def test_a_network_whose_scores_are_all_tied_takes_no_more() -> None:
    # Eight saturated layers: the flow's derivative is 0.0, so the order of ties decides between 20 million weights.
    assert copies("synflow", "Tanh", 1.0, 0.3, 1) <= 6
