"""Widths: the stock network of a name with other numbers of channels, built by its own constructor.

The network is constructed twice. The first time only the order in which its layers are made is noted; the second time
each layer is given the widths its name has in the table, and the constructor goes on to initialise what it made. So
initial weights are drawn as the library draws them for layers of that size, and no code travels with a width file.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from utils.system.atomic import write_json
from utils.system.errors import UserError
from utils.system.registry import nearest

FORMAT = "sieve-widths-1"

_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    _ConvNd: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    _NormBase: ("num_features",),
    nn.PReLU: ("num_parameters",),
}
"""What the constructors of layers are told about their widths."""

_SETTLED = ("num_heads", "attn_dim")
"""What attention keeps about the widths of its layers, set after construction."""


@dataclass(frozen=True)
class Widths:
    """What differs from the stock network: numbers by module and attribute, and shapes of bare parameters."""

    modules: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def widths_between(stock: nn.Module, other: nn.Module) -> Widths:
    """What makes `other`, a network of the same modules, out of `stock`."""
    modules: dict[str, dict[str, int]] = {}
    theirs = dict(other.named_modules())
    layers: set[str] = set()
    for name, module in stock.named_modules():
        known = [*_attributes(module), *(a for a in _SETTLED if isinstance(getattr(module, a, None), int))]
        if _attributes(module):
            layers.add(name)
        changed = {a: int(getattr(theirs[name], a)) for a in known if getattr(module, a) != getattr(theirs[name], a)}
        if changed:
            modules[name] = changed
    shapes = {name: tuple(p.shape) for name, p in other.named_parameters()}
    bare = {
        name: shapes[name]
        for name, p in stock.named_parameters()
        if name.rpartition(".")[0] not in layers and tuple(p.shape) != shapes[name]
    }
    return Widths(modules, bare)


def constructed(
    build: Callable[[], nn.Module], widths: Widths, drawing: contextlib.AbstractContextManager[None]
) -> nn.Module:
    """The network of `build` with `widths`; `drawing` seeds the construction that counts.

    Raises UserError for a module or parameter that the network has not.
    """
    made: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]), _making(lambda module, _: made.append(module)):
        stock = build()
    names = {id(module): name for name, module in stock.named_modules()}
    order = [names.get(id(module)) for module in made]
    _check_names(stock, widths)
    count = 0

    def substitute(module: nn.Module, arguments: dict[str, Any]) -> None:
        nonlocal count
        name = order[count] if count < len(order) else None
        count += 1
        if name is not None:
            arguments.update(widths.modules.get(name, {}))

    with drawing, _making(substitute):
        network = build()
    if count != len(order):
        raise UserError("this network makes other layers every time it is built, so its widths cannot be set")
    _settle(network, widths)
    return network


def _attributes(module: nn.Module) -> tuple[str, ...]:
    return next((names for kind, names in _ATTRIBUTES.items() if isinstance(module, kind)), ())


def _check_names(stock: nn.Module, widths: Widths) -> None:
    modules, parameters = dict(stock.named_modules()), dict(stock.named_parameters())
    for name, numbers in widths.modules.items():
        if name not in modules:
            raise UserError(f"widths: {name!r} is no module of this network{nearest(name, modules)}")
        for attribute in numbers:
            if not hasattr(modules[name], attribute):
                raise UserError(f"widths: {name!r} has no {attribute}; use widths made for this network")
    for name, shape in widths.parameters.items():
        if name not in parameters or parameters[name].dim() != len(shape):
            raise UserError(f"widths: {name!r} is no parameter of this network{nearest(name, parameters)}")


@contextlib.contextmanager
def _making(told: Callable[[nn.Module, dict[str, Any]], None]) -> Iterator[None]:
    """Within it `told(module, arguments)` hears of every layer about to be made, and may change the arguments."""
    originals = {kind: kind.__init__ for kind in _ATTRIBUTES}  # type: ignore[misc]
    try:
        for kind, original in originals.items():
            kind.__init__ = _telling(original, told)  # type: ignore[misc]
        yield
    finally:
        for kind, original in originals.items():
            kind.__init__ = original  # type: ignore[misc]


def _telling(original: Callable[..., None], told: Callable[[nn.Module, dict[str, Any]], None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        told(self, bound.arguments)
        original(*bound.args, **bound.kwargs)

    return init


@torch.no_grad()
def _settle(network: nn.Module, widths: Widths) -> None:
    modules = dict(network.named_modules())
    for name, numbers in widths.modules.items():
        for attribute, value in numbers.items():
            if attribute in _SETTLED:
                setattr(modules[name], attribute, value)
            elif getattr(modules[name], attribute) != value:
                raise UserError(f"widths: the constructor does not let {name!r} have {attribute}={value}")
    for name, shape in widths.parameters.items():
        path, _, leaf = name.rpartition(".")
        owner = network.get_submodule(path)
        stored: torch.Tensor = getattr(owner, leaf)
        for dim, size in enumerate(shape):
            repeats = -(-size // stored.shape[dim])
            stored = torch.cat([stored] * repeats, dim).narrow(dim, 0, size)
        setattr(owner, leaf, nn.Parameter(stored.detach().clone()))


@dataclass(frozen=True)
class WidthFile:
    """A network by name and widths: everything but its weights.

    facts: how it was made (channels kept by group, MACs and the like), for people and for tools.
    """

    model: str
    classes: int
    image_size: int | None
    widths: Widths
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        body = {"format": FORMAT, "model": self.model, "classes": self.classes, "image_size": self.image_size}
        shapes = {name: list(shape) for name, shape in self.widths.parameters.items()}
        modules = {name: dict(numbers) for name, numbers in self.widths.modules.items()}
        write_json(Path(path), {**body, "modules": modules, "parameters": shapes, "facts": dict(self.facts)})

    @staticmethod
    def load(path: str | Path) -> WidthFile:
        """Read a width file. Raises UserError naming it when it is missing or not one."""
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
            if body.pop("format") != FORMAT:
                raise ValueError("format")
            head = str(body.pop("model")), int(body.pop("classes")), body.pop("image_size")
            modules = {n: {a: int(v) for a, v in numbers.items()} for n, numbers in body.pop("modules").items()}
            shapes = {name: tuple(map(int, shape)) for name, shape in body.pop("parameters").items()}
            facts = dict(body.pop("facts"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a width file of ours ({type(error).__name__}); make it anew") from error
        return WidthFile(*head, Widths(modules, shapes), facts)
