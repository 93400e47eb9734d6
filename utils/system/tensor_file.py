"""The header of a safetensors file, read and checked against the file's size before a byte of a tensor is.

Nothing in a file decides how much memory is taken: every tensor's bytes are what its shape and type need, they lie
inside the file, in a row, without holes or overlaps, and the header itself is limited. Format: eight bytes of header
length (little endian), a JSON object, the tensors' bytes (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from utils.system.errors import UserError
from utils.system.json_file import parse_json

HEADER_LIMIT = 16 << 20
"""Bytes a header may have: some hundred thousand tensors."""

SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one value, by the format's name of its type."""

_MOST_DIMENSIONS = 16
_MOST_VALUES = 2**62


@dataclass(frozen=True)
class Entry:
    """One tensor: the format's name of its type, its shape, and where its bytes lie in the file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """A checked header: its tensors in the order of their bytes, and its metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: entry.shape for name, entry in self.entries.items()}


def open_file(path: str | Path) -> BinaryIO:
    """The file, open for reading. Raises UserError when there is none or it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file (on several nodes run.root must be a folder they share)")
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_header(path: str | Path, handle: BinaryIO | None = None) -> Header:
    """The checked header of a safetensors file (of `handle`, open at its start, where the caller reads on).

    Raises UserError naming a file that is missing, truncated, or not what its header says.
    """
    if handle is None:
        with open_file(path) as opened:
            return read_header(path, opened)
    try:
        size = os.fstat(handle.fileno()).st_size
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{size} bytes are too few")
        if length > HEADER_LIMIT:
            raise ValueError(f"a header of {length} bytes")
        return _checked(parse_json(handle.read(length)), 8 + length, size)
    except (ValueError, OSError) as error:
        raise broken(path, error) from error


def broken(path: str | Path, reason: object) -> UserError:
    """The error for a file that is not whole."""
    text = " ".join(str(reason).split())
    return UserError(f"{path}: not a whole safetensors file ({text}); make it anew")


def _checked(content: Any, begin: int, size: int) -> Header:
    if not isinstance(content, dict):
        raise ValueError("its header is no object")
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts")
    entries = {name: _entry(name, value, begin) for name, value in content.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)))
    place = begin
    for name, entry in entries.items():
        if entry.start != place:
            raise ValueError(f"{_short(name)} does not begin where the tensor before it ends")
        place += entry.size
        if place > size:
            raise ValueError(f"truncated: {_short(name)} ends at byte {place} of {size}")
    if place != size:
        raise ValueError(f"{size - place} bytes too many")
    return Header(entries, metadata)


def _entry(name: str, value: Any, begin: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_short(name)} is not described by dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in SIZES:
        raise ValueError(f"{_short(name)} is of unknown type {kind!r:.40}")
    if not _counts(shape) or len(shape) > _MOST_DIMENSIONS or math.prod(max(n, 1) for n in shape) > _MOST_VALUES:
        raise ValueError(f"{_short(name)} has no possible shape")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{_short(name)} has no possible place")
    taken = offsets[1] - offsets[0]
    if taken != math.prod(shape) * SIZES[kind]:
        raise ValueError(f"{_short(name)} has {taken} bytes, its shape needs {math.prod(shape) * SIZES[kind]}")
    return Entry(kind, tuple(shape), begin + offsets[0], taken)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _short(name: str) -> str:
    return f"{name!r:.80}"
