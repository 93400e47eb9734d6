"""Tensors on disk: safetensors files, written whole or not at all, read without executing anything.

Weights keep the model's state_dict keys. Tensors are stored contiguous, tied ones once, so that a file read with any
safetensors reader is the stock model's.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from utils.system import tensor_file
from utils.system.atomic import replacing
from utils.system.errors import UserError

_TYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32, "U64": torch.uint64,
    "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip


MOST_WRAPPERS = 8
"""Dicts around a state_dict that are looked into: a pickled dict may hold itself."""


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` (contiguous CPU copies, entries that share memory once each) and text `metadata`, atomically."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().to("cpu").contiguous()
        # safetensors refuses two names for one memory; a copy of our own is never shared.
        stored[name] = copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy
    with replacing(path) as temporary:
        write_file(temporary, stored, metadata)


def write_file(path: Path, stored: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """safetensors' `save_file`, which tells a full disk as OSError and leaves a file with the modes of any other."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(stored), str(path), dict(metadata))
        path.chmod(mode)  # newer releases write to a temporary of their own that nobody else may read
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)|\bOs { code: (\d+)", str(error))  # the latter: safetensors 0.5
        if found is None:
            raise
        number = int(found[1] or found[2])
        raise OSError(number, os.strerror(number)) from error


def load_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Raises UserError as `load_tensors` does."""
    return tensor_file.read_header(path).metadata


def load_tensors(
    path: str | Path, check: Callable[[Mapping[str, tuple[int, ...]]], None] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, of a file that others wrote too.

    check: told the shapes by name before memory is taken for any of them; raises what it does not want.
    Raises UserError that names a missing, truncated or foreign file.
    """
    with tensor_file.open_file(path) as handle:
        header = tensor_file.read_header(path, handle)
        if check is not None:
            check(header.shapes)
        # Read, not mapped: a file that shrinks meanwhile is an error, not a SIGBUS.
        return {name: _read(path, handle, name, entry) for name, entry in header.entries.items()}, header.metadata


def _read(path: str | Path, handle: BinaryIO, name: str, entry: tensor_file.Entry) -> torch.Tensor:
    """The next tensor of the file."""
    values = torch.empty(entry.size, dtype=torch.uint8)
    try:
        got = handle.readinto(values.numpy()) if entry.size else 0  # type: ignore[attr-defined]
    except OSError as error:
        raise tensor_file.broken(path, error.strerror) from error
    if got != entry.size:
        raise tensor_file.broken(path, f"it shrank while {name!r} was read")
    if entry.kind == "BOOL" and entry.size and int(values.max()) > 1:
        raise tensor_file.broken(path, f"{name!r} holds bytes that are neither true nor false")
    return values.view(_TYPES[entry.kind]).reshape(entry.shape)


def check_archive(path: Path) -> None:
    """Raise UserError for a torch.save archive that would unpack to more than it is: torch.save compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError, struct.error) as error:
        raise UserError(f"{path}: not a whole file of torch.save ({' '.join(str(error).split())})") from error
    stored = sum(entry.file_size for entry in entries)
    if stored > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path}: unpacks to {stored} bytes, which torch.save does not write; save it anew")


def check_foreign(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise UserError for a tensor out of `path` that is no plain one, or claims more values than the file can hold.

    A pickle may give any shape to a single stored value (strides of 0); the first operation would then fill memory.
    """
    size = path.stat().st_size
    if tensor.layout is not torch.strided:
        # Sparse: what it is once dense; a thousand times the file is beyond any mask or weight worth storing so.
        size *= 1000
    elif tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
        raise UserError(f"{path}: {name!r} is no plain tensor; save plain tensors")
    if tensor.numel() * tensor.element_size() > size:
        shape = "x".join(map(str, tensor.shape))
        raise UserError(f"{path}: {name!r} claims to be {shape}, more than the file holds; save it contiguous")


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state_dict with tied parameters once, under their first name."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        key = (id(tensor), tuple(tensor.shape))
        if key not in seen:
            seen.add(key)
            state[name] = tensor.detach()
    return state


def save_weights(path: str | Path, state: torch.nn.Module | Mapping[str, torch.Tensor], **metadata: str) -> None:
    """Write a bare model's weights and buffers (or a state dict) under their state_dict keys."""
    tensors = state_of(state) if isinstance(state, torch.nn.Module) else state
    save_tensors(path, tensors, {"format": "sieve-weights-1", **metadata})


def load_weights(path: str | Path, model: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a weight file. With a bare model, names, shapes and values are held to it.

    Raises UserError for a file that is not whole or not of this model, and for weights that are NaN.
    """
    if model is None:
        return load_tensors(path)[0]
    own = _shapes(state_of(model))
    tensors = load_tensors(path, lambda shapes: _fit(own, shapes, str(path)))[0]
    for name, tensor in tensors.items():
        # A finite sum has no NaN in it, and is several times as fast to find.
        if tensor.is_floating_point() and not bool(tensor.sum().isfinite()) and bool(tensor.isnan().any()):
            raise UserError(f"{path}: {name!r} holds NaN; make the file anew")
    return tensors


@torch.no_grad()
def put_weights(model: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str = "the weights") -> None:
    """Copy `state` into a bare model in place: addresses, strides and dtypes stay.

    Raises UserError naming the first key that is missing, unknown or of another shape.
    """
    own = state_of(model)
    _fit(_shapes(own), _shapes(state), source)
    for name, tensor in own.items():
        if tensor.is_floating_point() != state[name].is_floating_point():
            kinds = f"{state[name].dtype}, the model's is {tensor.dtype}"
            raise UserError(f"{source}: {name!r} is of {kinds}; use weights of this model")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _fit(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise UserError naming the first key of the shapes `given` that is missing, unknown or of another shape."""
    for name in [*own, *given]:
        if name not in given:
            raise UserError(f"{source}: {name!r} is missing; use weights of this model")
        if name not in own:
            raise UserError(f"{source}: {name!r} is not a tensor of this model; use weights of this model")
        if own[name] != given[name]:
            shapes = f"{given[name]}, the model's is {own[name]}"
            raise UserError(f"{source}: {name!r} has shape {shapes}; use weights of this model")


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 of names, dtypes, shapes and bytes, whatever the memory layout."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return sha.hexdigest()
