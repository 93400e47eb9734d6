"""Mask and weight files as bytes: digests, counts and zeros, worked out from the files alone.

A second way to the digests that utils/masks.py and utils/files.py give, by numpy and without the model, so that
`verify` does not ask the code that wrote a file whether it is right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.system import tensor_file
from utils.system.errors import UserError
from utils.system.tensor_file import Entry

_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32",
    "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
}  # fmt: skip
"""torch's names of the types; digests hold them."""

_EXPONENT = {"F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000),
             "F64": (np.uint64, 0x7FF0000000000000)}  # fmt: skip


@dataclass(frozen=True)
class Tensors:
    """A file's tensors: what each is, its bytes (uint8, one dimension), and the metadata."""

    entries: Mapping[str, Entry]
    raw: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Digest of weights: hex SHA-256 of names, types, shapes and bytes."""
        sha = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            sha.update(f"{name}\0torch.{_TORCH[entry.kind]}\0{entry.shape}\0".encode())
            sha.update(self.raw[name].data)
        return sha.hexdigest()

    @property
    def mask_digest(self) -> str:
        """Digest of masks: hex SHA-256 of names, shapes and bits."""
        sha = hashlib.sha256()
        for name in sorted(self.entries):
            sha.update(f"{name}\0{self.entries[name].shape}\0".encode())
            sha.update(np.packbits(self.raw[name] != 0).tobytes())
        return sha.hexdigest()

    @property
    def kept(self) -> dict[str, int]:
        """Of masks: kept weights by name."""
        return {name: int(np.count_nonzero(raw)) for name, raw in self.raw.items()}

    def alive(self, name: str, pruned: np.ndarray) -> int:
        """How many values of `name` are not +0.0 bit for bit where `pruned` (bool, one dimension) is True."""
        values = self.raw[name].reshape(pruned.size, -1)
        return int(np.count_nonzero(values[pruned].any(axis=1)))

    def infinite(self, name: str) -> int:
        """How many values of `name` are NaN or infinite; 0 for whole numbers."""
        if self.entries[name].kind not in _EXPONENT:
            return 0
        kind, exponent = _EXPONENT[self.entries[name].kind]
        return int(np.count_nonzero((self.raw[name].view(kind) & kind(exponent)) == exponent))


def read_tensors(path: Path) -> Tensors:
    """The file at `path`. Raises UserError when it is missing or not whole."""
    with tensor_file.open_file(path) as handle:
        header = tensor_file.read_header(path, handle)
        raw = {name: np.fromfile(handle, np.uint8, entry.size) for name, entry in header.entries.items()}
    for name, entry in header.entries.items():
        if raw[name].size != entry.size:
            raise tensor_file.broken(path, f"it shrank while {name!r} was read")
    return Tensors(header.entries, raw, header.metadata)


def read_mask(path: Path) -> Tensors:
    """The masks at `path`. Raises UserError when the file is missing, not whole, or not 0/1."""
    masks = read_tensors(path)
    for name, entry in masks.entries.items():
        if entry.kind not in ("U8", "BOOL") or bool((masks.raw[name] > 1).any()):
            raise UserError(f"{path}: {name!r} is not a 0/1 mask")
    return masks
