"""What made a result: versions, revision, command, hardware and threads, for environment.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from utils.system.cpus import allowed_cpus
from utils.system.distributed import World

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "ffcv",
    "fastargs",
    "numba",
    "numpy",
    "safetensors",
    "torch-pruning",
    "opencv-python-headless",
)


MOST_STARTS = 1000
"""Starts a record keeps, the newest."""


def describe(world: World, device: torch.device) -> dict[str, Any]:
    """Everything about this process and machine that can change bits or speed."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "revision": _revision(),
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "allowed_cpus": allowed_cpus(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": world.size,
        "local_ranks": world.local_size,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def start_of(described: dict[str, Any]) -> dict[str, Any]:
    """What is noted of every start of a run, the first and those that resume it, of `describe`'s record."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"time": now, **{name: described[name] for name in ("command", "host", "ranks", "revision")}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("-modified" if dirty.stdout.strip() else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
