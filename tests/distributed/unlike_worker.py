"""harness.py where rank 1 alone has no native update, as on a node where it was not built."""

from __future__ import annotations

import os
from pathlib import Path

import harness
from utils import native

if __name__ == "__main__":
    if os.environ["LOCAL_RANK"] == "1":
        native.UPDATE = Path("/nonexistent.so")
    harness.main()
