"""timm's image classifiers by timm's names, with or without a tag. timm is imported when one is asked for."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from utils.models import pretrained
from utils.system.errors import UserError


def construct(name: str, num_classes: int, image_size: int | None, tag: str) -> nn.Module:
    """The network `name` with `num_classes` outputs; `tag` names published weights (empty: fresh).

    timm loads its own weights: it fits positions to the image size, and the head to `num_classes`. Raises UserError
    for an unknown name or tag, a size the network does not take, or weights that cannot be fetched.
    """
    import timm

    check(name)
    full = _with_tag(name, tag)
    options = {"num_classes": num_classes, **_size_option(full, image_size)}
    try:
        network: nn.Module = timm.create_model(full, pretrained=bool(tag), **options)
    except Exception as error:  # a download fails in many ways
        reason = pretrained.one_line(error)
        if tag:
            message = f"model.pretrained: cannot load {tag!r} of timm/{name} ({reason}); give a local file"
            raise UserError(message) from error
        if "img_size" in options:
            raise UserError(pretrained.bad_size(f"timm/{name}", image_size, error)) from error
        raise
    config = timm.get_pretrained_cfg(full)
    if tag and config is not None and config.num_classes != num_classes:
        pretrained.say_new_head(f"timm/{name} {tag}", config.num_classes, num_classes)
    return network


def check(name: str) -> None:
    """Raise UserError unless `name` is one of timm's models."""
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(f'timm/{c}' for c in close)}?" if close else "see timm.list_models()"
        raise UserError(f"model.name: unknown timm/{name}; {hint}")


def loaded(network: nn.Module, name: str, file_name: str) -> None:
    """Nothing to adapt: timm's networks do the same with every weight file."""


def _with_tag(name: str, tag: str) -> str:
    """`name` with the tag of the published weights; raises UserError when the model has no such weights."""
    import timm

    arch, _, present = name.partition(".")
    tags = [entry.partition(".")[2] for entry in timm.list_models(f"{arch}.*", pretrained=True)]
    if present and present not in tags:
        raise UserError(f"model.name: timm/{arch} has no weights tagged {present!r}{_known(tags)}")
    if not tag:
        return name
    if tag != "default" and (tag not in tags or (present and tag != present)):
        raise UserError(f"model.pretrained: timm/{name} has no weights tagged {tag!r}{_known(tags)}")
    if tag == "default" and not tags:
        raise UserError(f"model.pretrained: timm/{name} has no published weights; give a file or leave it empty")
    return name if present or tag == "default" else f"{arch}.{tag}"


def _known(tags: list[str]) -> str:
    return f"; known: default, {', '.join(sorted(tags))}" if tags else "; it has none, give a file or leave it empty"


def _size_option(name: str, size: int | None) -> dict[str, Any]:
    """`img_size` for networks whose weights depend on the image size, when it is not the size they are made for."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if size is None or config is None or not config.fixed_input_size or tuple(config.input_size[1:]) == (size, size):
        return {}
    return {"img_size": size}
