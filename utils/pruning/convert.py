"""Masks out of other people's files: zeros in weights, mask buffers, torch.nn.utils.prune; nothing in them is executed.

A file is a safetensors file or what torch.save wrote of plain tensors in (nested) dicts: a state_dict, or one under
`state_dict`, `model_state_dict`, `model` or `net`. Names lose the prefixes of DDP (`module.`) and torch.compile
(`_orig_mod.`).
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import files
from utils.masks import FORMAT, Masks, bare, prunable_parameters
from utils.system.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which checkpoints keep the state_dict."""

PREFIXES = ("module.", "_orig_mod.")

MASK_FILE = "mask file"
BUFFERS = "*.mask buffers"
REPARAMETRIZED = "*_mask of torch.nn.utils.prune"
BOTH = f"{BUFFERS} and {REPARAMETRIZED}"
ZEROS = "zeros in the weights"

_FORBIDDEN = re.compile(r"unsupported (global|class)|blocked|reduce|instantiate|GLOBAL ", re.IGNORECASE)
"""What torch says of a pickle that wants more than tensors and plain containers."""


@dataclass(frozen=True)
class Converted:
    """What `convert` found.

    form: one of the constants above. whole: prunable parameters of the model that the file does not mask: of a mask
    file, they are left out of the masks; of all others, the masks keep every weight of them. metadata: a mask file's.
    """

    masks: Masks
    form: str
    whole: tuple[str, ...]
    metadata: dict[str, str]


def convert(source: str | Path, model: nn.Module | None = None) -> Converted:
    """The masks in a file, by whichever of these it has, in this order:

    - our own mask file, returned as it is;
    - 0/1 tensors `<layer>.mask` beside `<layer>.weight` (masked layers), and `<layer>.weight_mask`, alone or beside
      `<layer>.weight_orig` (torch.nn.utils.prune): 0 is pruned, whatever the weights hold;
    - the zeros of its weights. A live weight that happens to be exactly 0 cannot be told from a pruned one.

    With a model, names and shapes are checked against it, tied weights are one entry, and prunable parameters without
    an entry are kept whole. Without one, masks are taken as they are, those of linear layers that were stored as
    1x1 convolutions ([out, in, 1] buffers) in linear shape; zeros are read of every tensor of two or more dimensions
    whose name ends in `weight`. That leaves out norms and biases, but not embeddings, which look like linear layers:
    give the model where there are any.

    Raises UserError for a file that is missing, empty, truncated, needs code to be run, or has no mask; for masks
    that are not 0/1, contradict each other, or do not fit the model.
    """
    path = Path(source)
    tensors, metadata = _read(path)
    if metadata.get("format") == FORMAT:
        masks = Masks.load(path, model)
        return Converted(masks, MASK_FILE, _whole(masks, model), metadata)
    form, found = _from_entries(path, tensors, model)
    if not found:
        form, found = ZEROS, _from_zeros(path, tensors, model)
    if model is None:
        return Converted(_matrices(path, found), form, (), {})
    masks, dense = _fitted(path, found, model), Masks.dense(model)
    return Converted(Masks({**dense, **masks}), form, _whole(masks, model), {})


# Reading --------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and a safetensors file's metadata."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as handle:
        head = handle.read(16)
    if not head:
        raise UserError(f"{path}: the file is empty; write it anew")
    # safetensors: eight bytes of header length, then JSON.
    if path.suffix == ".safetensors" or (head[5:9] == b"\0\0\0{"):
        return files.load_tensors(path)
    files.check_archive(path)
    payload = _unwrapped(_unpickled(path, mmap=head[:2] == b"PK"))
    if not isinstance(payload, Mapping):
        raise UserError(f"{path}: holds {type(payload).__name__}, not a dict of tensors; save a state_dict")
    tensors = {name: tensor for name, tensor in payload.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        files.check_foreign(path, name, tensor)
    return tensors, {}


def _unpickled(path: Path, mmap: bool) -> Any:
    """What torch.save wrote, on the CPU; mmap (zip files only) leaves on disk what is not looked at."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats; what matters is raised
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file raises anything
        text = " ".join(str(error).split())
        if "TorchScript" not in text and not (isinstance(error, pickle.UnpicklingError) and _FORBIDDEN.search(text)):
            raise UserError(f"{path}: not a whole file of torch.save or safetensors; write it anew") from error
        named = re.search(r"(?:GLOBAL|global:?) ([\w.]+\.[\w.]+)", text)
        asks = f" ({named[1]})" if named else ""
        raise UserError(
            f"{path}: holds more than tensors{asks}, and nothing in it is executed; save its state_dict alone, "
            "with torch.save(model.state_dict(), ...)"
        ) from error


def _unwrapped(payload: Any) -> Any:
    """The innermost state_dict of a checkpoint; of one that holds itself, some level."""
    for _ in range(files.MOST_WRAPPERS):
        if not isinstance(payload, Mapping):
            break
        inner = next((payload[key] for key in WRAPPERS if isinstance(payload.get(key), Mapping)), None)
        if inner is None:
            break
        payload = inner
    return payload


# Finding --------------------------------------------------------------------------------------------------------------


def _from_entries(path: Path, tensors: Mapping[str, Tensor], model: nn.Module | None) -> tuple[str, dict[str, Tensor]]:
    """The form, and the masks that are stored as such; none when there are none."""
    buffers, reparametrized = [], []
    only = all(key.endswith(".mask") for key in tensors)
    for key in tensors:
        layer, name = key.removesuffix(".mask"), key.removesuffix("_mask")
        if layer != key and (only or f"{layer}.weight" in tensors):
            buffers.append((f"{layer}.weight", key))
        # An `attn_mask` buffer is no mask of weights.
        elif name != key and (name.endswith("weight") or f"{name}_orig" in tensors):
            reparametrized.append((name, key))
    form = BOTH if buffers and reparametrized else BUFFERS if buffers else REPARAMETRIZED
    entries = [(name, _zero_one(path, key, tensors[key])) for name, key in buffers + reparametrized]
    if model is None:
        linear = {name for name, _ in buffers}
        entries = [(name, _linear(mask) if name in linear else mask) for name, mask in entries]
    return form, _gather(path, entries, model)


def _zero_one(path: Path, key: str, tensor: Tensor) -> Tensor:
    """`tensor` as bool. Raises UserError for a value that is neither 0 nor 1."""
    tensor = _dense(tensor)
    mask = tensor != 0
    if not torch.equal(mask.to(tensor.dtype), tensor):
        raise UserError(f"{path}: {key!r} holds values other than 0 and 1; it is no mask")
    return mask


def _from_zeros(path: Path, tensors: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, Tensor]:
    """Masks that keep what is not 0. Raises UserError when there is no such weight or no zero."""
    if model is None:
        entries = [(name, tensor) for name, tensor in tensors.items() if name.endswith("weight") and tensor.dim() > 1]
    else:
        prunable, first = prunable_parameters(model), _first_names(model)
        own = {name: _own_name(name, first) for name in tensors}
        entries = [(name, tensor) for name, tensor in tensors.items() if own[name] in prunable]
    found = _gather(path, [(name, _dense(tensor) != 0) for name, tensor in entries], model)
    if not found:
        mend = "use a file of this model's weights" if model is not None else "give the model it is of"
        raise UserError(f"{path}: no mask found, nor a weight that could hold zeros; {mend}")
    if all(bool(mask.all()) for mask in found.values()):
        raise UserError(f"{path}: no mask found: it has no mask entries and none of its weights is 0; is it dense?")
    return found


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _gather(path: Path, entries: Sequence[tuple[str, Tensor]], model: nn.Module | None) -> dict[str, Tensor]:
    """Masks under bare names, tied weights under their first. Raises UserError for two that contradict each other."""
    first = _first_names(model) if model is not None else {}
    found: dict[str, Tensor] = {}
    for name, mask in entries:
        own = _own_name(name, first)
        if own in found and not torch.equal(found[own], mask):
            raise UserError(f"{path}: holds two different masks for {own!r}; leave one of them in the file")
        found[own] = mask
    return found


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter, with the first name of the same parameter."""
    first: dict[int, str] = {}
    named = bare(model).named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def _own_name(name: str, first: Mapping[str, str]) -> str:
    """`name` without the prefixes of wrappers (unless the model itself has such a name), of tied weights the first."""
    while name not in first and name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return first.get(name, name)


# Fitting --------------------------------------------------------------------------------------------------------------


def _linear(mask: Tensor) -> Tensor:
    """The mask of a linear layer that was run as a 1x1 convolution, as a matrix; others as they are."""
    return mask.squeeze(2) if mask.dim() == 3 and mask.shape[2] == 1 else mask


def _matrices(path: Path, found: Mapping[str, Tensor]) -> Masks:
    """`found` without biases and norms. Raises UserError for one of those that is pruned."""
    for name, mask in found.items():
        if mask.dim() < 2 and not bool(mask.all()):
            raise UserError(f"{path}: prunes {name!r}, a bias or a norm; only weights of layers can be masked")
    masks = Masks({name: mask for name, mask in found.items() if mask.dim() > 1})
    if not masks:
        raise UserError(f"{path}: no mask of a layer's weight found; use a file of masked weights")
    return masks


def _fitted(path: Path, found: Mapping[str, Tensor], model: nn.Module) -> Masks:
    """`found` in the shapes of the model's prunable parameters. Raises UserError for what does not fit."""
    prunable, all_parameters = prunable_parameters(model), _first_names(model)
    fitted = {}
    for name, mask in found.items():
        if name not in prunable and name in all_parameters and bool(mask.all()):
            continue  # a bias or a norm that was not pruned
        shape = prunable[name].shape if name in prunable else mask.shape
        fitted[name] = mask.reshape(shape) if _core(mask.shape) == _core(shape) else mask
    if not fitted:
        raise UserError(f"{path}: no mask of a prunable parameter found; use a file of this model")
    return Masks(fitted).check(model, str(path))


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` as a matrix's where all that follows is 1: linear layers and 1x1 convolutions stand for each other."""
    end = len(shape)
    while end > 2 and shape[end - 1] == 1:
        end -= 1
    return tuple(shape[:end])


def _whole(masks: Masks, model: nn.Module | None) -> tuple[str, ...]:
    return tuple(name for name in prunable_parameters(model) if name not in masks) if model is not None else ()
