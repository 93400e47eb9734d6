"""A checkpoint's file: the whole state of training in one safetensors file, written whole, read without trust.

Tensors go by name: `model.<key>` (weights and buffers of rank 0), `optimizer.<parameter>.<key>`, `mask.<parameter>`,
`extension.<i>.<name>`, and what each rank has of its own, `rank<r>.rng`, `rank<r>.device_rng`, `rank<r>.totals` and
`rank<r>.buffer.<name>`. Everything else is JSON in the file's metadata. Nothing in the file is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from utils import files
from utils.system.atomic import replacing
from utils.system.errors import UserError

FORMAT = "sieve-checkpoint-1"
PROGRESS = ("epoch", "step", "rows", "row", "lr", "size", "images", "seconds", "waited")
"""Fields of `Progress` in the JSON part."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that was read: its tensors, and its JSON part."""

    path: Path
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    @property
    def notes(self) -> dict[str, Any]:
        """What the level's driver had noted."""
        notes: dict[str, Any] = self.facts["notes"]
        return notes


def write(path: Path, previous: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint to `path`; the one there before moves to `previous` once the new one was read back whole."""
    stored = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    # safetensors refuses two names for one memory.
    stored = {n: t.clone() if t.data_ptr() == tensors[n].data_ptr() else t for n, t in stored.items()}
    metadata = {"format": FORMAT, "digest": files.digest(stored), "state": json.dumps(facts)}
    with replacing(path) as temporary:
        files.write_file(temporary, stored, metadata)
        read(temporary)
        if path.exists():
            os.replace(path, previous)


def read(path: Path) -> Snapshot:
    """Read a checkpoint. Raises UserError that names a file which is damaged, truncated or no checkpoint."""
    tensors, metadata = files.load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this version")
    if metadata.get("digest") != files.digest(tensors):
        raise UserError(f"{path}: damaged, its tensors are not those that were written")
    try:
        facts = json.loads(metadata["state"])
        _check_facts(facts)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: its state cannot be read ({' '.join(str(error).split())})") from error
    return Snapshot(path, tensors, facts)


def _check_facts(facts: Any) -> None:
    """Raise ValueError unless the JSON part has the types its readers rely on."""
    if not isinstance(facts, dict):
        raise ValueError("no object")
    kinds: dict[str, Any] = {
        **dict.fromkeys(("epoch", "step", "images", "level", "ranks"), int),
        **dict.fromkeys(("seconds", "waited"), (int, float)),
        "lr": (int, float, type(None)), "size": (int, type(None)), "row": (dict, type(None)), "rows": list,
        "key": str, "scaler": dict, "extensions": list, "notes": dict,
    }  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(facts.get(name), kind) or name not in facts:
            raise ValueError(f"{name} is {facts.get(name)!r}")
    if facts["epoch"] < 0 or facts["step"] < 0 or not 1 <= facts["ranks"] <= 1 << 20:
        raise ValueError("impossible position")
    if not all(isinstance(row, dict) for row in facts["rows"]):
        raise ValueError("rows are no objects")
