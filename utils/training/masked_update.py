"""The optimizer's step and the masks in one pass over the weights, on CPUs.

torch's own step and the hooks of `Sparsity` walk over weights, gradients and state several times; the native update
does so once, and leaves +0.0 at pruned places whatever the gradients there are. The optimizer stays torch's: its groups
are read at every step, its state is where it keeps it, and steps of either kind can follow each other.

It is taken only where its bits are those of the optimizer's own step on this machine, which a small trial shows. So
the trajectory does not depend on the native library.
"""

from __future__ import annotations

import copy
import ctypes
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils import native
from utils.sparsity import Sparsity

_CAPABILITIES = ("AVX2", "AVX512")
"""What torch calls CPUs on which it multiplies and adds in one rounding, as the native update does."""
_VECTOR = 8
"""float32 values in a vector of torch's fused Adam, which has no version for wider registers."""
_UNKNOWN = ("maximize", "amsgrad", "differentiable", "capturable")
"""Options of torch's optimizers, off by default, that the native update does not know."""
_TRIAL_SIZES, _TRIAL_STEPS = (101, 64, 15, 3), 4


class Unfit(Exception):
    """The optimizer's own step has to be taken.

    told: whether a user should hear of it, because a better set-up of the machine would do.
    """

    def __init__(self, reason: str, told: bool = False) -> None:
        super().__init__(reason)
        self.told = told


class MaskedUpdate:
    """Steps an optimizer inside a `Sparsity`'s masks."""

    def __init__(self, optimizer: torch.optim.Optimizer, sparsity: Sparsity) -> None:
        """Raises Unfit where the optimizer's own step has to be taken instead."""
        if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
            raise Unfit(f"{type(optimizer).__name__} has no native update")
        _check_hooks(optimizer)
        for group in optimizer.param_groups:
            _check_group(group)
        try:
            native.load_update()
        except native.Missing as missing:
            raise Unfit(f"of the native update, {missing} (make setup builds it)", told=True) from None
        self._rule = _Rule(optimizer)
        self._sparsity = sparsity
        self._masks: object = None
        self._live: dict[int, Tensor] = {}
        if not all(_same_bits(optimizer, group) for group in optimizer.param_groups):
            raise Unfit("the native update's bits are not torch's on this machine", told=True)

    def step(self) -> None:
        """One step with the gradients that are there; what they hold at pruned places does not matter."""
        if self._sparsity.masks is not self._masks:
            self._masks = self._sparsity.masks
            self._live = _live_places(self._sparsity)
        self._rule.step(self._live)


class _Rule:
    """The native update of one optimizer's parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.library = native.load_update()

    @torch.no_grad()
    def step(self, live: Mapping[int, Tensor]) -> None:
        """live: uint8 in the parameter's strides, 1 where a weight lives, by the parameter's id; none: all live."""
        update = self._sgd if isinstance(self.optimizer, torch.optim.SGD) else self._adam
        for group in self.optimizer.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                update(group, parameters, live)
                torch.autograd.graph.increment_version(parameters)

    def _sgd(self, group: dict[str, Any], parameters: list[Tensor], live: Mapping[int, Tensor]) -> None:
        momenta, fresh = None, [0] * len(parameters)
        if group["momentum"]:
            states = [self.optimizer.state[p] for p in parameters]
            fresh = [int(state.get("momentum_buffer") is None) for state in states]
            momenta = [self._state(p, "momentum_buffer") for p in parameters]
        gradients, arrays = self._arrays(parameters, live)
        self._done(
            self.library.sieve_sgd(
                len(parameters), *arrays[:2], momenta and _pointers(momenta), *arrays[2:],
                (ctypes.c_uint8 * len(fresh))(*fresh), group["lr"], group["momentum"], group["dampening"],
                group["weight_decay"], group["nesterov"], torch.get_num_threads(),
            )
        )  # fmt: skip
        del gradients

    def _adam(self, group: dict[str, Any], parameters: list[Tensor], live: Mapping[int, Tensor]) -> None:
        by_step: dict[float, list[Tensor]] = {}
        counters = [self._counter(p) for p in parameters]
        torch._foreach_add_(counters, 1)
        for p, counter in zip(parameters, counters, strict=True):
            by_step.setdefault(counter.item(), []).append(p)
        for step, some in by_step.items():
            moments = [[self._state(p, key) for p in some] for key in ("exp_avg", "exp_avg_sq")]
            gradients, arrays = self._arrays(some, live)
            self._done(
                self.library.sieve_adam(
                    len(some), *arrays[:2], *map(_pointers, moments), *arrays[2:], group["lr"], *group["betas"],
                    group["eps"], group["weight_decay"], group.get("decoupled_weight_decay", False), step,
                    _VECTOR, torch.get_num_threads(),
                )
            )  # fmt: skip
            del gradients

    def _counter(self, p: Tensor) -> Tensor:
        state = self.optimizer.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        counter: Tensor = state["step"]
        return counter

    def _state(self, p: Tensor, key: str) -> Tensor:
        """The state tensor in the parameter's strides; zeros where there is none yet."""
        state = self.optimizer.state[p]
        value: Tensor | None = state.get(key)
        if value is None:
            value = state[key] = torch.zeros_like(p, requires_grad=False)
        if value.stride() != p.stride():
            value = state[key] = torch.empty_like(p, requires_grad=False).copy_(value)
        return value

    def _arrays(self, parameters: list[Tensor], live: Mapping[int, Tensor]) -> tuple[list[Tensor], tuple[Any, ...]]:
        """Gradients in the parameters' strides, to be kept while their pointers are used; and pointers to weights,
        gradients, live places, and sizes."""
        gradients = []
        for p in parameters:
            assert p.grad is not None
            same = p.grad.stride() == p.stride()
            gradients.append(p.grad if same else torch.empty_like(p, requires_grad=False).copy_(p.grad))
        masks = (ctypes.c_void_p * len(parameters))(
            *(live[id(p)].data_ptr() if id(p) in live else None for p in parameters)
        )
        sizes = (ctypes.c_int64 * len(parameters))(*(p.numel() for p in parameters))
        return gradients, (_pointers(parameters), _pointers(gradients), masks, sizes)

    @staticmethod
    def _done(code: int) -> None:
        if code:
            raise RuntimeError("the native update does not run on this CPU")


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _live_places(sparsity: Sparsity) -> dict[int, Tensor]:
    pruned = [name for name in sparsity.parameters if not bool(sparsity.masks[name].all())]
    return {id(sparsity.parameters[name]): sparsity.live(name).to(torch.uint8) for name in pruned}


def _check_hooks(optimizer: torch.optim.Optimizer) -> None:
    before: Any = getattr(optimizer, "_optimizer_step_pre_hooks", {})
    after: Any = getattr(optimizer, "_optimizer_step_post_hooks", {})
    if before or len(after) > 1 or "step" in vars(optimizer):  # one is the Sparsity's own
        raise Unfit("the optimizer has hooks on its step")


def _check_group(group: dict[str, Any]) -> None:
    on = [key for key in _UNKNOWN if group.get(key)]
    if on or isinstance(group["lr"], Tensor):
        raise Unfit(f"{', '.join(on) or 'a rate that is a tensor'} has no native update")
    if torch.backends.cpu.get_cpu_capability() not in _CAPABILITIES:
        raise Unfit("the native update is for CPUs with AVX2")
    for p in group["params"]:
        # Memory without gaps or overlaps is what a copy in the same format has the strides of.
        dense = p.layout == torch.strided and torch.empty_like(p, device="meta").stride() == p.stride()
        if p.device.type != "cpu" or p.dtype != torch.float32 or not dense:
            raise Unfit("the native update is for float32 on CPUs")


def _same_bits(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """A few steps of a copy of the optimizer with the group's constants, natively and by torch, at made-up weights."""
    generator = torch.Generator().manual_seed(0)
    kind: Any = type(optimizer)
    options = {key: value for key, value in group.items() if key in inspect.signature(kind).parameters} | {"lr": 0.05}
    options.pop("params")
    ours = [nn.Parameter(torch.randn(size, generator=generator)) for size in _TRIAL_SIZES]
    live = {id(p): torch.rand(p.shape, generator=generator) < 0.5 for p in ours[:-1]}
    masks = [live.get(id(p), torch.ones(p.shape, dtype=torch.bool)) for p in ours]
    with torch.no_grad():
        for p, mask in zip(ours, masks, strict=True):
            p[~mask] = 0.0
    theirs = copy.deepcopy(ours)
    natively, stock = kind(ours, **options), kind(theirs, **options)
    rule, places = _Rule(natively), {key: mask.to(torch.uint8) for key, mask in live.items()}
    for _ in range(_TRIAL_STEPS):
        for p, q, mask in zip(ours, theirs, masks, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.masked_fill(~mask, 0.0)
        rule.step(places)
        stock.step()
        for q, mask in zip(theirs, masks, strict=True):  # as `Sparsity` would: 0 / 0 at pruned places is no difference
            for value in [q, *(v for v in stock.state[q].values() if isinstance(v, Tensor) and v.shape == q.shape)]:
                value.detach().masked_fill_(~mask, 0.0)
    return all(_equal(p, q, natively.state[p], stock.state[q]) for p, q in zip(ours, theirs, strict=True))


def _equal(p: Tensor, q: Tensor, state: dict[str, Any], other: dict[str, Any]) -> bool:
    if state.keys() != {key for key, value in other.items() if value is not None}:
        return False
    pairs = [(p, q), *((state[key], other[key]) for key in state)]
    return all(torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32)) for a, b in pairs)
