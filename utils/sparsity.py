"""Keeps a model inside its masks while it trains, without touching its modules.

Gradients are masked as they are accumulated (so before DDP's reduction, unscaling and clipping), or where the trainer
says so, at the end of the backward pass or by a step that masks all it touches, on all ranks alike; weights after every
optimizer step. With weights and optimizer state projected whenever masks change, pruned weights are exactly
+0.0 after every step, and the live ones follow the trajectory of a `weight * mask` forward bit for bit (eager float32
on a CPU).

Zeroing multiplies the bits, taken as an integer of the element's size, by 1 or 0: it moves the bytes of a product, but
turns inf and NaN into +0.0, never makes -0.0, and goes over all parameters in few launches on a GPU. The words live in
the parameter's own strides, and a change of masks copies into them, so that addresses captured by a CUDA graph or a
compiled step stay valid.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from utils.masks import Masks, bare

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def attach(model: nn.Module, optimizer: torch.optim.Optimizer | None, masks: Masks) -> Sparsity:
    """Hold `model` inside `masks` from here on: after every `optimizer.step()` pruned weights are 0.0.

    Attach after the model has its final device and memory format. Raises UserError when the masks are another model's.
    """
    return Sparsity(model, optimizer, masks)


class Sparsity:
    """The masks of one model on its device, and the hooks that enforce them. Made by `attach`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, masks: Masks) -> None:
        masks.check(model)
        named = dict(bare(model).named_parameters())
        self._parameters = {name: named[name] for name in masks}
        self._words = {name: _full_words(p) for name, p in self._parameters.items()}
        self._masks = masks
        self._version = 0
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = lambda: None
        self._step_hook: RemovableHandle | None = None
        self._gate = _Gate()
        self._hooks = [
            p.register_post_accumulate_grad_hook(_gradient_hook(self._words[name], self._gate))
            for name, p in self._parameters.items()
            if p.requires_grad
        ]
        self.watch(optimizer)
        self.set(masks)

    @property
    def masks(self) -> Masks:
        """The masks enforced now."""
        return self._masks

    @property
    def version(self) -> int:
        """Another number after every change of masks."""
        return self._version

    @property
    def dense(self) -> bool:
        """Whether gradients of pruned weights are let through just now."""
        return self._gate.dense

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters held, by name."""
        return self._parameters

    def live(self, name: str) -> torch.Tensor:
        """Integers in the parameter's shape and strides, on its device: 1 where a weight lives, else 0."""
        return self._words[name]

    def watch(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Enforce the masks after the steps of this optimizer, instead of the one before it."""
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None
        self._optimizer = lambda: None
        if optimizer is not None:
            # Held weakly: the optimizer holds this object through its hook, and a cycle would keep the model's memory.
            self._optimizer = weakref.ref(optimizer)
            # A hook of the optimizer is not called for the steps a GradScaler skips.
            self._step_hook = optimizer.register_step_post_hook(self._after_step)

    def set(self, masks: Masks) -> None:
        """Change the masks: copy them into place, then project weights, gradients and optimizer state."""
        shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        if {name: tuple(mask.shape) for name, mask in masks.items()} != shapes:
            raise ValueError("masks cover other parameters than those attached; attach anew")
        for name, words in self._words.items():
            words.copy_(masks[name].to(words.device).to(words.dtype))
        self._masks = masks
        self._version += 1
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Fill pruned places with 0.0: weights, gradients and every weight-shaped optimizer state."""
        for name, p in self._parameters.items():
            self.zero_pruned(name, p)
            if p.grad is not None:
                self.zero_pruned(name, p.grad)
            for value in self._state_of(p):
                self.zero_pruned(name, value)

    def zero_pruned(self, name: str, tensor: torch.Tensor) -> None:
        """Fill `tensor`, shaped as parameter `name`, with 0.0 where the parameter is pruned, in place."""
        _zero(tensor, self._words[name])

    def stored(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Which entries of `parameter` are kept: bool, flat, in the order of its memory; None where no mask covers it.

        Weights whose memory has gaps are told in the order of their places.
        """
        for name, p in self._parameters.items():
            if p is parameter:
                words = self._words[name]
                gaps = words.untyped_storage().nbytes() != words.numel() * words.element_size()
                return (words.flatten() if gaps else words.as_strided((words.numel(),), (1,))) != 0
        return None

    def detach(self) -> None:
        """Remove all hooks; weights stay as they are."""
        self.watch(None)
        while self._hooks:
            self._hooks.pop().remove()

    def dense_gradients(self, dense: bool) -> None:
        """Let gradients of pruned weights through (a mask update reads them), until switched back."""
        self._gate.dense = dense

    def late_gradients(self, late: bool) -> None:
        """Leave masking the gradients to whoever steps, until switched back.

        They must then be masked by `mask_gradients` before anything reads them, or by the step itself.
        """
        self._gate.late = late

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Fill the gradients there are with 0.0 at pruned places."""
        held = [(p.grad, self._words[name]) for name, p in self._parameters.items() if p.grad is not None]
        _zero_all([grad for grad, _ in held], [words for _, words in held])

    def violations(self) -> list[str]:
        """Names of parameters with a pruned weight or optimizer state that is not exactly +0.0."""
        bad = []
        for name, p in self._parameters.items():
            tensors = [p, *self._state_of(p)]
            pruned = self._words[name] - 1  # all ones where nothing lives, else 0
            if any(bool((_bits(t) & pruned).count_nonzero()) for t in tensors):
                bad.append(name)
        return bad

    def _after_step(self, *_: Any) -> None:
        with torch.no_grad():
            _zero_all(list(self._parameters.values()), list(self._words.values()))

    def _state_of(self, p: torch.Tensor) -> Iterable[torch.Tensor]:
        optimizer = self._optimizer()
        state = optimizer.state.get(p, {}) if optimizer is not None else {}
        return [
            v for v in state.values() if isinstance(v, torch.Tensor) and v.shape == p.shape and v.is_floating_point()
        ]


class _Gate:
    """Whether gradients pass unmasked just now: for a mask update to read, or because the step masks them itself."""

    dense = False
    late = False


def _gradient_hook(words: torch.Tensor, gate: _Gate) -> Callable[[torch.Tensor], None]:
    # It must not hold the parameter it hangs on: autograd's hooks are no part of Python's cycle collection, and the
    # model would never be freed.
    def mask(p: torch.Tensor) -> None:
        if p.grad is not None and not (gate.dense or gate.late):
            _zero(p.grad, words)

    return mask


def _zero(tensor: torch.Tensor, words: torch.Tensor) -> None:
    if _same_size(tensor, words):
        tensor.detach().view(words.dtype).mul_(words)
    else:
        tensor.detach().masked_fill_(words == 0, 0.0)


def _zero_all(tensors: Sequence[torch.Tensor], words: Sequence[torch.Tensor]) -> None:
    # Lists of one type each: torch goes over others one by one.
    alike: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for tensor, places in zip(tensors, words, strict=True):
        if _same_size(tensor, places):
            values, factors = alike.setdefault(places.dtype, ([], []))
            values.append(tensor.detach().view(places.dtype))
            factors.append(places)
        else:
            _zero(tensor, places)
    for values, factors in alike.values():
        torch._foreach_mul_(values, factors)


def _same_size(tensor: torch.Tensor, words: torch.Tensor) -> bool:
    return tensor.element_size() == words.element_size() and tensor.is_floating_point()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(_WORDS[tensor.element_size()])


def _full_words(p: torch.Tensor) -> torch.Tensor:
    """Words of 1 in the parameter's shape, strides and element size."""
    return torch.empty_strided(p.shape, p.stride(), dtype=_WORDS[p.element_size()], device=p.device).fill_(1)
