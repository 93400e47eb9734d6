"""The number of allowed CPUs: of the affinity mask, not of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.system import environment
from utils.system.cpus import allowed_cpus
from utils.system.distributed import World

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_a_process_held_to_one_cpu_counts_one() -> None:
    code = """
        import os
        from utils.system.cpus import allowed_cpus
        before = allowed_cpus()
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(before, allowed_cpus())
    """
    words = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(os.sched_getaffinity(0))), "1"]


@pytest.mark.parametrize(("count", "expected"), [(6, 6), (None, 1)])
def test_without_affinity_masks_all_cpus_count(
    monkeypatch: pytest.MonkeyPatch, count: int | None, expected: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert allowed_cpus() == expected


def test_the_environments_record_counts_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 5}, raising=False)
    assert allowed_cpus() == 3
    assert environment.describe(World(), torch.device("cpu"))["allowed_cpus"] == 3
