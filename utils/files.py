"""Tensors on disk: safetensors files, written whole or not at all, read without executing anything.

Weights keep the model's state_dict keys. Tensors are stored contiguous, tied ones once, so that a file read with any
safetensors reader is the stock model's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.system.atomic import replacing
from utils.system.errors import UserError


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
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def load_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Raises UserError as `load_tensors` does."""
    with _opened(path) as handle:
        return dict(handle.metadata() or {})


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises UserError that names a missing, truncated or foreign file."""
    with _opened(path) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file (on several nodes run.root must be a folder they share)")
    try:
        with safe_open(str(path), "pt") as handle:
            yield handle
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a whole safetensors file ({reason}); make it anew") from error


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


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file."""
    return load_tensors(path)[0]


@torch.no_grad()
def put_weights(model: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str = "the weights") -> None:
    """Copy `state` into a bare model in place: addresses, strides and dtypes stay.

    Raises UserError naming the first key that is missing, unknown or of another shape.
    """
    own = state_of(model)
    for name in [*own, *state]:
        if name not in state:
            raise UserError(f"{source}: {name!r} is missing; use weights of this model")
        if name not in own:
            raise UserError(f"{source}: {name!r} is not a tensor of this model; use weights of this model")
        if own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, the model's is {tuple(own[name].shape)}"
            raise UserError(f"{source}: {name!r} has shape {shapes}; use weights of this model")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 of names, dtypes, shapes and bytes, whatever the memory layout."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return sha.hexdigest()
