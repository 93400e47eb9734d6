"""torchvision's image classifiers by torchvision's names. torchvision is imported when one is asked for."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from utils.models import pretrained
from utils.system.errors import UserError

_AUXILIARY = ("googlenet", "inception_v3")
"""Trained without their auxiliary heads: a loss on those is no part of what is compared here."""

_KINDS = ("detection", "segmentation", "video", "optical_flow", "quantization")


def construct(name: str, num_classes: int, image_size: int | None, tag: str) -> nn.Module:
    """The network `name` with `num_classes` outputs; `tag` names published weights (empty: fresh).

    Raises UserError for a name that is not one of torchvision's classifiers, a size the network does not take, or
    weights that are unknown or cannot be fetched.
    """
    from torchvision import models

    check(name)
    options: dict[str, Any] = {"num_classes": num_classes}
    if name in _AUXILIARY:
        options.update(aux_logits=False, init_weights=True)
    if image_size is not None:
        options.update(_size_option(name, image_size))
    try:
        network: nn.Module = models.get_model(name, **options)
    except (AssertionError, ValueError) as error:
        raise UserError(pretrained.bad_size(f"torchvision/{name}", image_size, error)) from error
    if tag:
        state = _published(name, tag)
        pretrained.put(network, state, f"torchvision/{name} {tag}")
        _expect_imagenet_input(network)
    return network


def loaded(network: nn.Module, name: str, file_name: str) -> None:
    """Treat a file that torchvision itself publishes like the weights it is, known by its name."""
    from torchvision import models

    if any(entry.url.rpartition("/")[2] == file_name for entry in models.get_model_weights(name)):
        _expect_imagenet_input(network)


def _expect_imagenet_input(network: nn.Module) -> None:
    # The published GoogLeNet and Inception were trained on pixels in [-1, 1]; with this set they map from pixels
    # normalised by ImageNet's statistics, as torchvision does when it loads them.
    if hasattr(network, "transform_input"):
        network.transform_input = True  # type: ignore[assignment]


def _size_option(name: str, size: int) -> dict[str, Any]:
    """The constructor argument that carries the image size, for the families whose weights depend on it."""
    if name.startswith("vit_"):
        return {"image_size": size}
    if name.startswith("maxvit"):
        return {"input_size": (size, size)}
    return {}


def check(name: str) -> None:
    """Raise UserError unless `name` is one of torchvision's image classifiers."""
    from torchvision import models

    known = models.list_models(module=models)
    if name in known:
        return
    for kind in _KINDS:
        if name in models.list_models(module=getattr(models, kind)):
            raise UserError(f"model.name: torchvision/{name} is a {kind} model; take an image classifier")
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near = ", ".join(f"torchvision/{c}" for c in close)
    hint = f"did you mean {near}?" if close else "see torchvision.models.list_models()"
    raise UserError(f"model.name: unknown torchvision/{name}; {hint}")


def _published(name: str, tag: str) -> dict[str, torch.Tensor]:
    from torchvision import models

    entries = models.get_model_weights(name)
    names = sorted(set(entries.__members__) - {"DEFAULT"})
    wanted = tag.rpartition(".")[2]
    if wanted.lower() == "default":
        entry = entries.DEFAULT
    elif wanted in names:
        entry = entries[wanted]
    else:
        known = f"known: default, {', '.join(names)}"
        raise UserError(f"model.pretrained: torchvision/{name} has no weights {tag!r}; {known}")
    try:
        return dict(entry.get_state_dict(progress=False, check_hash=True))
    except Exception as error:  # URL, socket, hash and pickle errors alike: the weights cannot be had
        reason = pretrained.one_line(error)
        message = f"model.pretrained: cannot fetch {tag!r} of torchvision/{name} ({reason}); give the file {entry.url}"
        raise UserError(message) from error
