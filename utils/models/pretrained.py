"""Weights a network starts from: reading a file without running code in it, and fitting it to the network.

Only the head may differ, and only in its number of classes; everything else must match key by key and shape by shape.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils import files
from utils.system.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".th")
"""A value of `model.pretrained` that ends so, or holds a slash, is a file."""

_CONTAINERS = ("state_dict", "model", "model_state_dict")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def local_file(pretrained: str) -> Path | None:
    """The file `model.pretrained` names, whether it exists or not; None when it is empty or a weights name."""
    if "/" in pretrained or pretrained.lower().endswith(SUFFIXES):
        return Path(pretrained).expanduser()
    return None


def one_line(error: BaseException, longest: int = 160) -> str:
    """The first line of an error's message, shortened."""
    lines = str(error).strip().splitlines()
    text = " ".join(lines[0].split()) if lines else ""
    return text if len(text) <= longest else text[: longest - 3] + "..."


def bad_size(name: str, size: int | None, error: BaseException, key: str = "data.image_size") -> str:
    """The message for images a network cannot take; `key` is the parameter their size comes from."""
    reason = one_line(error) or "its layers do not fit"
    return f"{key}: {name} cannot take {size} px images ({reason}); take another size"


def read(path: Path) -> dict[str, torch.Tensor]:
    """State dict of a safetensors file, or of any other by `torch.load(weights_only=True)`: code in it never runs.

    A state dict inside `state_dict`, `model` or `model_state_dict` is found, and the prefixes DDP and torch.compile
    give to keys are dropped. Raises UserError naming a file that is missing, truncated or holds no weights.
    """
    if not path.is_file():
        raise UserError(f"model.pretrained: {path}: no such file")
    if path.suffix.lower() == ".safetensors":
        return _plain_keys(files.load_weights(path))
    try:
        files.check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError as error:
        raise UserError(f"model.pretrained: {error}") from error
    except Exception as error:  # broken archives and pickles raise nearly anything
        raise UserError(
            f"model.pretrained: {path}: not a whole torch file of plain tensors ({one_line(error)}); "
            "objects in a file are never run: save the state_dict alone, or as safetensors"
        ) from error
    return _plain_keys(_state_dict_in(content, path))


def _state_dict_in(content: Any, path: Path) -> dict[str, torch.Tensor]:
    for _ in range(files.MOST_WRAPPERS):
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"model.pretrained: {path}: holds no state_dict; save the model's state_dict alone")
    for key, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"model.pretrained: {path}: {key!r} is no tensor; save the model's state_dict alone")
        files.check_foreign(path, str(key), value)
    return dict(content)


def _plain_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys of the bare model: `_orig_mod.` anywhere and `module.` in front of every key are wrappers' doing."""
    plain = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while plain and all(key.startswith("module.") for key in plain):
        plain = {key.removeprefix("module."): value for key, value in plain.items()}
    return plain


def head_names(network: nn.Module) -> list[str]:
    """Parameters of the classifier: what timm says it is, else the last linear or convolution layer."""
    if hasattr(network, "get_classifier"):
        found: Any = network.get_classifier()  # type: ignore[operator]
        heads = list(found) if isinstance(found, (tuple, list)) else [found]
    else:
        heads = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1:]
    inside = {id(p) for head in heads if isinstance(head, nn.Module) for p in head.parameters()}
    return [name for name, p in network.named_parameters() if id(p) in inside]


@torch.no_grad()
def put(network: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy `state` into `network` in place; a head of another number of classes is left as it is, with a log line.

    Weights of auxiliary heads the network does without are ignored, and BatchNorm counters may be missing. Raises
    UserError naming `source` and the first keys that are unknown, missing or of another shape.
    """
    own = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, torch.Tensor)}
    state = _fitting_keys(network, own, state)
    kept = [name for name in head_names(network) if name in state and _other_classes(own[name], state[name])]
    if kept:
        say_new_head(source, state[kept[0]].shape[0], own[kept[0]].shape[0])
        state = {name: tensor for name, tensor in state.items() if name not in kept}
    required = [name for name in files.state_of(network) if not name.endswith("num_batches_tracked")]
    _refuse(source, "are not in this model", [name for name in state if name not in own])
    _refuse(source, "are missing", [name for name in required if name not in state and name not in kept])
    _refuse(
        source,
        "do not fit",
        [
            f"{name} ({_shape(tensor)}, the model's is {_shape(own[name])})"
            for name, tensor in state.items()
            if own[name].shape != tensor.shape or own[name].is_floating_point() != tensor.is_floating_point()
        ],
    )
    _refuse(source, "hold NaN", [n for n, t in state.items() if t.is_floating_point() and bool(t.isnan().any())])
    for name, tensor in state.items():
        own[name].copy_(tensor)


def say_new_head(source: str, theirs: int, ours: int) -> None:
    """The one log line about a dropped head."""
    log.warning("%s: its head of %d classes is dropped; one of %d classes starts fresh", source, theirs, ours)


def _fitting_keys(
    network: nn.Module, own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Without absent auxiliary heads, and with today's names of torchvision's DenseNet layers."""
    fitted = {}
    for key, tensor in state.items():
        if key not in own:
            if getattr(network, "aux_logits", None) is False and key.startswith(_AUXILIARY):
                continue
            key = _OLD_DENSENET.sub(r"\1\2.", key)
        fitted[key] = tensor
    return fitted


def _other_classes(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.ndim == theirs.ndim and ours.shape[0] != theirs.shape[0] and ours.shape[1:] == theirs.shape[1:]


def _refuse(source: str, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(f"model.pretrained: {source}: {', '.join(names[:3])}{more} {what}; use weights of this model")


def _shape(tensor: torch.Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
