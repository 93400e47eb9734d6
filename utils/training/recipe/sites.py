"""Where skip connections go: found by running the network once and following its tensors, not by class names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from utils.masks import bare

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_POOLS = (nn.AvgPool2d, nn.MaxPool2d)


@dataclass(frozen=True)
class Site:
    """A convolution that can be bridged.

    name: of its weight; exit: the module at whose output the skip is added, `conv` itself where no norm follows.
    """

    name: str
    conv: nn.Conv2d
    exit: nn.Module


@dataclass
class _Call:
    module: nn.Module
    inputs: tuple[int, ...]
    output: int
    first_inside: nn.Module | None


@dataclass
class _Trace:
    """The calls of modules that do something themselves, in the order they ended; tensors go by their `id`."""

    image: int
    calls: list[_Call] = field(default_factory=list)
    readers: dict[int, list[nn.Module]] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)
    """Everything seen, so that no id is used twice."""


def find_sites(model: nn.Module, names: Iterable[str], side: int) -> list[Site]:
    """Sites of the convolutions whose weights are among `names`, in the order they run, for images of `side` pixels.

    The skip goes from the convolution's input to the output of the norm behind it (before an activation that the norm
    holds), or to the convolution's own output. Left out are convolutions that read the image, shortcuts (1x1, reading
    what another convolution reads or a pooling of it, their result read by no module), those on single pixels (squeeze
    and excitation), and those that run more than once. The model, its buffers and random states stay as they are.
    """
    network = bare(model)
    wanted, named = set(names), {id(m): name for name, m in network.named_modules()}
    trace = _run(network, side)
    runs = [call for call in trace.calls if isinstance(call.module, nn.Conv2d)]
    times: dict[int, int] = {}
    for call in trace.calls:
        times[id(call.module)] = times.get(id(call.module), 0) + 1
    pooled = {c.output: c.inputs[0] for c in trace.calls if isinstance(c.module, _POOLS)}
    read = [pooled.get(call.inputs[0], call.inputs[0]) for call in runs]
    sites = []
    for call in runs:
        conv = call.module
        assert isinstance(conv, nn.Conv2d)
        name = f"{named[id(conv)]}.weight"
        if name not in wanted or times[id(conv)] > 1 or call.inputs[0] == trace.image:
            continue
        norm = _norm_behind(trace, call)
        if norm is not None and times[id(norm.module)] > 1:
            norm = None
        result = call.output if norm is None else norm.output
        single = conv.kernel_size == (1, 1)
        if single and read.count(pooled.get(call.inputs[0], call.inputs[0])) > 1 and not trace.readers.get(result):
            continue
        if single and _pixels(trace, call.output) == 1:
            continue
        sites.append(Site(name, conv, conv if norm is None else norm.first_inside or norm.module))
    return sites


def _norm_behind(trace: _Trace, call: _Call) -> _Call | None:
    """The call of the norm that alone reads what `call` returns, with the same shape."""
    readers = trace.readers.get(call.output, [])
    if len(readers) != 1 or not isinstance(readers[0], _NORMS):
        return None
    return next(c for c in trace.calls if c.module is readers[0] and c.inputs[0] == call.output)


def _pixels(trace: _Trace, tensor: int) -> int:
    shape = next(t.shape for t in trace.alive if id(t) == tensor)
    return shape[-1] * shape[-2]


@torch.no_grad()
def _run(network: nn.Module, side: int) -> _Trace:
    first = next(network.parameters())
    image = torch.zeros(2, 3, side, side, device=first.device, dtype=first.dtype)
    trace = _Trace(id(image), alive=[image])
    running: list[list[nn.Module]] = [[]]

    def enter(module: nn.Module, args: Any) -> None:
        running[-1].append(module)
        running.append([])

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        inside = running.pop()
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if not tensors or not isinstance(result, Tensor) or (inside and not isinstance(module, _NORMS)):
            return
        trace.alive += [*tensors, result]
        trace.calls.append(_Call(module, tuple(map(id, tensors)), id(result), inside[0] if inside else None))
        for tensor in tensors:
            trace.readers.setdefault(id(tensor), []).append(module)

    modules = list(network.modules())
    flags = [module.training for module in modules]
    hooks = [h for m in modules for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    devices = [first.device] if first.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            network.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in zip(modules, flags, strict=True):
            module.training = training
    return trace
