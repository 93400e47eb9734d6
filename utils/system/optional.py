"""Packages that only some commands need, asked for before any work is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from utils.system.errors import UserError

ONNX = ("onnx", "onnxruntime", "onnxscript")
"""What `--export onnx` needs; `make setup` installs them."""


def require(asked: str, packages: Sequence[str]) -> None:
    """Raise UserError, naming what `asked` for them, unless all `packages` are installed. Imports nothing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise UserError(f"{asked}: needs {names}, not installed here; run: pip install {' '.join(missing)}")
