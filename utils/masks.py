"""`Masks`: which weights live. An immutable value, one bool tensor per prunable parameter, by parameter name.

Prunable parameters are every Conv and Linear weight and the projection weights of attention modules; never biases,
norms or embeddings. Names are those of the bare model, whatever wraps it (DDP, torch.compile); tied weights are one
entry, under the first name.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils import files
from utils.system.errors import UserError
from utils.system.registry import nearest

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
FORMAT = "sieve-masks-1"
_PIECE = 1 << 15


def bare(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile wrappers, in any order."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def prunable_parameters(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The weights a mask may touch, by bare name in the model's order, tied weights once.

    exclude: globs over parameter names. Raises UserError for a glob that matches no prunable parameter.
    """
    model = bare(model)
    weights: set[int] = set()
    for module in model.modules():
        if isinstance(module, _WEIGHTED):
            weights.add(id(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            weights.update(id(getattr(module, name)) for name in _ATTENTION if getattr(module, name) is not None)
    found = {name: p for name, p in model.named_parameters() if id(p) in weights}
    for glob in exclude:
        if not fnmatch.filter(found, glob):
            raise UserError(f"pruning.exclude: {glob!r} matches no prunable parameter{nearest(glob, found)}")
    return {name: p for name, p in found.items() if not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)}


class Masks(Mapping[str, torch.Tensor]):
    """Bool CPU tensors by parameter name: True keeps a weight. Immutable; treat the tensors as read-only.

    `on` gives them on a GPU. They stay there as long as this object does, 1 byte a weight: from the first call, or from
    the start where they were made of tensors on that GPU.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies `tensors`, at once if one GPU holds them all. Raises ValueError for a tensor that is not bool."""
        for name, tensor in tensors.items():
            if tensor.dtype != torch.bool:
                raise ValueError(f"mask of {name!r} is {tensor.dtype}, not bool")
        self._there: dict[torch.device, dict[str, torch.Tensor]] = {}
        devices = {tensor.device for tensor in tensors.values()}
        if len(devices) == 1 and (device := devices.pop()).type != "cpu":
            self._there[device] = copied(tensors, device)
            self._tensors = copied(self._there[device], torch.device("cpu"))
        else:
            self._tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}

    @staticmethod
    def dense(model: nn.Module, exclude: Sequence[str] = ()) -> Masks:
        """Masks that keep every prunable weight of `model`."""
        found = prunable_parameters(model, exclude)
        return Masks({name: torch.ones(p.shape, dtype=torch.bool) for name, p in found.items()})

    def on(self, device: torch.device) -> Mapping[str, torch.Tensor]:
        """The tensors on `device`, as tensors name theirs; to be read only, too. Copied to a GPU once, all in one."""
        if device.type == "cpu":
            return self
        if device not in self._there:
            self._there[device] = copied(self._tensors, device)
        return self._there[device]

    def __reduce__(self) -> tuple[type[Masks], tuple[dict[str, torch.Tensor]]]:
        """Copies and pickles hold nothing on a GPU, and each tensor's own bytes: of a view, all it views is written."""
        return Masks, ({name: tensor.clone() for name, tensor in self._tensors.items()},)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, {self.kept:,} of {self.total:,} kept, density {self.density:.4f})"

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Kept weights per parameter."""
        return {name: int(np.count_nonzero(t.numpy())) for name, t in self._tensors.items()}  # 5 x as fast as torch's

    @property
    def kept(self) -> int:
        """Kept weights."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """Prunable weights."""
        return sum(t.numel() for t in self._tensors.values())

    @property
    def density(self) -> float:
        """Kept over prunable weights; 1.0 where nothing is prunable."""
        return self.kept / self.total if self.total else 1.0

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of names, shapes and bits; independent of device, order of entries and file format."""
        sha = hashlib.sha256()
        for name in sorted(self._tensors):
            tensor = self._tensors[name]
            sha.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
            sha.update(_pack(tensor))
        return sha.hexdigest()

    def __and__(self, other: Masks) -> Masks:
        self._same_places(other)
        return Masks({name: t & other[name] for name, t in self.items()})

    def __or__(self, other: Masks) -> Masks:
        self._same_places(other)
        return Masks({name: t | other[name] for name, t in self.items()})

    def __le__(self, other: Masks) -> bool:
        """True when every weight kept here is kept in `other`."""
        self._same_places(other)
        return not any(np.greater(t.numpy(), other[name].numpy()).any() for name, t in self.items())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return list(self) == list(other) and all(torch.equal(t, other[name]) for name, t in self.items())

    def __hash__(self) -> int:
        return hash(self.digest)

    def _same_places(self, other: Masks) -> None:
        mine, theirs = ({name: tuple(t.shape) for name, t in masks.items()} for masks in (self, other))
        if mine != theirs:
            odd = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            raise ValueError(f"masks cover different parameters, first {odd[0]!r}")

    def check(self, model: nn.Module, source: str = "the masks") -> Masks:
        """Return self if every entry is a prunable parameter of `model` of that shape; else raise UserError."""
        _check_shapes({name: tuple(tensor.shape) for name, tensor in self.items()}, model, source)
        return self

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Fill pruned weights of `model` with 0.0 in place (a product would keep NaN and make -0.0)."""
        parameters = dict(bare(model).named_parameters())
        for name in self:
            weights = parameters[name].detach()
            for part, live in pieces(weights, self.on(weights.device)[name]):
                part.copy_(filled(part, live))

    def save(self, path: str | Path, **metadata: str) -> None:
        """Write a safetensors file of uint8 0/1 tensors; its metadata holds the digest and what is given here."""
        tensors = {name: t.to(torch.uint8) for name, t in self.items()}
        own = {"format": FORMAT, "digest": self.digest, "kept": str(self.kept), "total": str(self.total)}
        files.save_tensors(path, tensors, {**metadata, **own})

    @staticmethod
    def load(path: str | Path, model: nn.Module | None = None) -> Masks:
        """Read a mask file. Raises UserError naming it when truncated, foreign, not 0/1, or not `model`'s."""

        def check(shapes: Mapping[str, tuple[int, ...]]) -> None:
            if model is not None:
                _check_shapes(shapes, model, str(path))

        tensors, metadata = files.load_tensors(path, check)
        for name, tensor in tensors.items():
            if tensor.dtype not in (torch.uint8, torch.bool) or (tensor.numel() and int(tensor.max()) > 1):
                raise UserError(f"{path}: {name!r} is not a 0/1 mask; is this a weight file?")
        masks = Masks({name: t.bool() for name, t in tensors.items()})
        ours = metadata.get("format") == FORMAT
        if metadata.get("digest", None if ours else masks.digest) != masks.digest:
            raise UserError(f"{path}: its digest does not match its bits; the file is damaged, make it anew")
        return _in_model_order(masks, model) if model is not None else masks


def copied(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Contiguous copies on `device` of `tensors`, which are on one device and of one dtype, as views of one tensor.

    Between a GPU and the CPU one copy of all takes far less time than one for each.
    """
    if not tensors:
        return {}
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])
    if flat.device.type == "cuda" and device.type == "cpu":
        # Into page-locked memory the GPU writes by itself; torch keeps what was freed of it for the next round's.
        moved = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat)
    else:
        moved = flat.to(device)
    parts = moved.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


def filled(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A copy of `values` (floating point, any strides) with 0.0 where `mask`, on their device, is False.

    Not a product, whose inf * 0 is NaN: the bits are cleared. On CPUs several times faster than `masked_fill` or
    `where`, which branch on every weight.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    keep = mask.view(torch.int8).neg().to(bits)  # all ones, or none
    return (values.view(bits) & keep).view(values.dtype)


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of `tensors`, of one shape, along their first dimension; together they are the whole.

    On a CPU a piece stays in its cache, so that a chain of elementwise operations on it reads and writes memory once.
    """
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= _PIECE:
        yield tensors
        return
    yield from zip(*(tensor.split(max(1, len(first) * _PIECE // first.numel())) for tensor in tensors), strict=True)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], model: nn.Module, source: str) -> None:
    found = prunable_parameters(model)
    for name, shape in shapes.items():
        if name not in found:
            raise UserError(f"{source}: {name!r} is not a prunable parameter of this model{nearest(name, found)}")
        own = tuple(found[name].shape)
        if own != shape:
            raise UserError(
                f"{source}: {name!r} has shape {_shape(shape)}, the model's is {_shape(own)}; "
                "use a mask made for this model"
            )


def _in_model_order(masks: Masks, model: nn.Module) -> Masks:
    return Masks({name: masks[name] for name in prunable_parameters(model) if name in masks})


def _pack(tensor: torch.Tensor) -> bytes:
    return np.packbits(tensor.numpy().reshape(-1)).tobytes()


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
