"""The native libraries in tests: skipped where they cannot be built, a failure where `make setup` would build them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess

import pytest
import torch

from utils import native


def need_decoder() -> None:
    """Skip the test where the decoder has nothing to be built with, or FFCV, for which it is built, is not there."""
    try:
        native.load()
    except native.Missing as missing:
        if importlib.util.find_spec("ffcv") is not None and _compiles("#include <cstdio>\n#include <jpeglib.h>\n"):
            pytest.fail(f"the native decoder could be built here, but {missing}: run make setup")
        pytest.skip(f"the native decoder: {missing}")


def need_update() -> None:
    """Skip the test where the optimizer step has no compiler, or its CPU lacks AVX2."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the native update is for CPUs with AVX2")
    try:
        native.load_update()
    except native.Missing as missing:
        if _compiles("#include <thread>\n"):
            pytest.fail(f"the native update could be built here, but {missing}: run make setup")
        pytest.skip(f"the native update: {missing}")


def _compiles(text: str) -> bool:
    if shutil.which("g++") is None:
        return False
    command = ["g++", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True).returncode == 0
