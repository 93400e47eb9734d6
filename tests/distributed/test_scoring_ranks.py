"""One, two and three ranks on the same micro-batches: the same scores and the same masks, by every criterion."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from utils.masks import Masks
from utils.pruning.criteria import criterion

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.distributed

CASES = [f"{name}-{count}" for count in (7, 2) for name in criterion.names()]


def launch(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run `command` with one thread per rank, under torchrun if there are several."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *torchrun, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scores")


@functools.cache
def score(place: Path, ranks: int) -> tuple[Path, list[dict[str, list[str]]]]:
    """Where `ranks` ranks left their scores, and each rank's mask digests by case."""
    out = place / str(ranks)
    out.mkdir(exist_ok=True)
    done = launch(ranks, "tests/distributed/scoring_worker.py", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_masks_are_equal_on_all_ranks_and_those_of_one(place: Path, ranks: int) -> None:
    one = score(place, 1)[1][0]
    many = score(place, ranks)[1]
    assert list(one) == CASES
    assert all(rank == many[0] for rank in many)
    assert many[0] == one
    # Not because the data does not matter: seven and two micro-batches give other masks.
    reading = [name for name in criterion.names() if criterion.entry(name).traits["reads"] == "train"]
    assert all(one[f"{name}-7"] != one[f"{name}-2"] for name in reading)


@pytest.mark.parametrize("ranks", [2, 3])
def test_scores_are_those_of_one_rank(place: Path, ranks: int) -> None:
    for case in CASES:
        one, many = (load_file(score(place, n)[0] / f"{case}.safetensors") for n in (1, ranks))
        assert one.keys() == many.keys()
        for name, expected in one.items():
            largest = float(expected.abs().max())
            assert largest > 0
            assert float((many[name] - expected).abs().max()) <= 1e-5 * largest, (case, name)


def test_alone_on_two_ranks_writes_the_mask_of_one(tmp_path: Path) -> None:
    words = [
        "-m", "utils.pruning", "--data.name=digits", "--data.loader=device", "--model.name=cifar/resnet20",
        "--pruning.criterion=snip", "--pruning.samples_per_class=6", "--pruning.batch_size=20",
        "--pruning.rounds=2", "--pruning.density=0.1",
    ]  # fmt: skip
    masks = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks) / "m.safetensors"
        done = launch(ranks, *words, "--out", str(out))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("wrote ") == 1
        assert {path.name for path in out.parent.iterdir()} == {"m.safetensors", "m.layers.csv", "m.rounds.csv"}
        masks.append(Masks.load(out))
        assert masks[-1].digest in done.stdout
    assert masks[0] == masks[1]
    assert masks[0].kept == int(0.1 * masks[0].total + 0.5)
