"""Networks by name: `torchvision/<name>`, `timm/<name>` and the CIFAR-style ones registered here, behind one `build`.

Every network is the stock module with stock state_dict keys and a head of the data set's classes. Its initial weights
depend on (seed, name, classes) alone, so runs of different methods start from the same ones.

A new network is one function `(num_classes) -> nn.Module` with one decorator, in a file of this package:

    @model("cifar/my_net")
    def my_net(num_classes: int) -> nn.Module: ...
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from utils import files
from utils.models import pretrained as weights
from utils.models.widths import WidthFile, Widths, constructed
from utils.system.errors import UserError
from utils.system.registry import Registry, nearest

Builder = Callable[[int], nn.Module]
"""Number of classes to a network with fresh weights."""

model: Registry[Builder] = Registry("model")

_ZOOS = {"torchvision/": "utils.models.torchvision_zoo", "timm/": "utils.models.timm_zoo"}


class Zoo(Protocol):
    """A module that builds a library's networks by the library's own names."""

    def check(self, name: str) -> None:
        """Raise UserError for a name that is not the library's."""
        ...

    def construct(self, name: str, num_classes: int, image_size: int | None, tag: str) -> nn.Module:
        """The network with fresh weights, or with the published ones called `tag`."""
        ...

    def loaded(self, network: nn.Module, name: str, file_name: str) -> None:
        """Called after weights were read from a local file."""
        ...


def build(
    name: str,
    num_classes: int,
    *,
    pretrained: str = "",
    image_size: int | None = None,
    other_sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    widths: Widths | None = None,
) -> nn.Module:
    """The network called `name` for RGB images, in train mode, on the CPU, in float32.

    num_classes: outputs of the head.
    pretrained: empty for fresh weights; a file (has a suffix of weight files or a slash); or the name of published
        weights (`default`, `IMAGENET1K_V1`, a timm tag). A head of another size is dropped and starts fresh.
    image_size: side of the square images in pixels. It shapes transformers with fixed positions, and the network is
        tried on one such image. None: the network's own, untried.
    other_sizes: sizes it must take too, by the parameter they come from (evaluation, progressive resizing).
    seed: initial weights are a function of (seed, name, num_classes), whatever the thread count; no global random
        state is read or changed.
    widths: numbers of channels that differ from the stock network's, as `rebuild` reads them; fresh weights alone.

    Raises UserError for an unknown name, weights that do not fit, or images the network cannot take.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; a head needs at least one class")
    path = weights.local_file(pretrained)
    if widths is not None and pretrained:
        raise UserError(
            f"model.pretrained={pretrained}: {name} with other widths than the stock network's starts fresh"
        )
    drawing = _drawing_from(f"initial weights of {name}, {num_classes} classes, seed {seed}")
    if widths is None:
        with drawing:
            network = _construct(name, num_classes, image_size, "" if path else pretrained)
    else:
        network = constructed(lambda: _construct(name, num_classes, image_size, ""), widths, drawing)
    if path is not None:
        weights.put(network, weights.read(path), str(path))
        zoo, short = _zoo(name)
        if zoo is not None:
            zoo.loaded(network, short, path.name)
    if image_size is not None:
        for key, size in {"data.image_size": image_size, **(other_sizes or {})}.items():
            _try(network, name, num_classes, size, key)
    return network.train()


def rebuild(path: str | Path, weight_file: str | Path | None = None) -> nn.Module:
    """The network of a width file, from the stock constructor, with the weights of `weight_file` (else fresh ones).

    Raises UserError naming the file that is not what it should be.
    """
    found = WidthFile.load(path)
    network = build(found.model, found.classes, image_size=found.image_size, widths=found.widths)
    if weight_file is not None:
        files.put_weights(network, files.load_weights(weight_file), str(weight_file))
    return network


def check_name(name: str) -> None:
    """Raise UserError, with the nearest names, unless `build` knows the network called `name`."""
    zoo, short = _zoo(name)
    if zoo is not None:
        zoo.check(short)
    elif name not in model:
        known = nearest(name, model.names())
        raise UserError(f"model.name: unknown {name!r}{known} (or torchvision/<name>, timm/<name>)")


def _zoo(name: str) -> tuple[Zoo | None, str]:
    """The library behind `name` and the name it has there; None for a network registered here."""
    for prefix, home in _ZOOS.items():
        if name.startswith(prefix):
            zoo: Zoo = importlib.import_module(home)
            return zoo, name.removeprefix(prefix)
    return None, name


def _construct(name: str, num_classes: int, image_size: int | None, tag: str) -> nn.Module:
    zoo, short = _zoo(name)
    if zoo is not None:
        return zoo.construct(short, num_classes, image_size, tag)
    check_name(name)
    if tag:
        raise UserError(f"model.pretrained: {name} has no published weights {tag!r}; give a file or leave it empty")
    return model[name](num_classes)


@contextlib.contextmanager
def _drawing_from(text: str) -> Iterator[None]:
    """Torch's CPU generator seeded with a hash of `text`, and one thread, for the time of the block.

    One thread, because where a vectorised fill is cut among threads may decide the last bit of a value.
    """
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@torch.no_grad()
def _try(network: nn.Module, name: str, num_classes: int, size: int, key: str) -> None:
    """Run one black image through, so that a wrong size stops a run before it starts. Leaves no trace."""
    try:
        with torch.random.fork_rng(devices=[]):
            out = network.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise UserError(weights.bad_size(name, size, error, key)) from error
    if not isinstance(out, torch.Tensor) or out.shape != (1, num_classes):
        raise UserError(f"model.name: {name} is not an image classifier: its output is not one score per class")
