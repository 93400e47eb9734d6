"""Ghost skip connections (Jaiswal et al. 2022): out + alpha * S(x) around masked convolutions, alpha from 1 to 0.

`out` is what the norm behind the convolution returns, x what the convolution reads. S takes the pixels of x under the
centres of the kernel's places, and

    identity   channel c of the result from channel c mod C_in of x: nothing to learn, nothing to keep
    1x1        a 1x1 convolution of its own (as many groups as the convolution)

and brings each image to mean 0 and variance 1. (The released skip ends in a BatchNorm. A bare identity would double the
signal at every convolution of a residual network: the loss of a ResNet-20 starts at 100.)

At the end of the ramp, where alpha is 0, nothing of it is left in the network. The weights of 1x1 skips are not the
model's: they are in no mask, no density and no weight file, the level's optimizer trains them in a group of its own,
and the extension's state holds them. `training.clip` bounds the gradients of the model's own parameters alone.
"""

from __future__ import annotations

import fnmatch
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils import params
from utils.data.stateless import derive
from utils.masks import Masks
from utils.system.distributed import mean_over_ranks
from utils.system.errors import UserError
from utils.system.registry import nearest
from utils.training.optimizers import add_apart, apart_state, load_apart_state, remove_apart
from utils.training.recipe import Inserted, at_step, step_of
from utils.training.recipe.ramp import Ramp, span
from utils.training.recipe.sites import Site, find_sites

BUFFER = "ghost_alpha"
_DECAY = 0.01
"""Ratio of the exponential shape: a hundredth is left at the end, before it is taken off."""


class _Skip:
    """S of one convolution, and the image that waits for it. No module: the network must not count what it holds."""

    def __init__(self, conv: nn.Conv2d, weight: nn.Parameter | None) -> None:
        self.weight = weight
        self.groups = conv.groups
        self.channels = conv.out_channels
        self.stride = (conv.stride[0], conv.stride[1])
        self.offset = tuple(_offset(conv, axis) for axis in (0, 1))
        self.image: Tensor | None = None

    def of(self, image: Tensor, height: int, width: int) -> Tensor:
        """S(image) [B, C_out, height, width] for `image` [B, C_in, H, W]."""
        picked = self._centres(image, height, width)
        if self.weight is not None:
            return functional.group_norm(functional.conv2d(picked, self.weight, groups=self.groups), 1)
        repeats = -(-self.channels // picked.shape[1])
        tiled = torch.cat([picked] * repeats, 1) if repeats > 1 else picked
        return functional.group_norm(tiled[:, : self.channels], 1)

    def _centres(self, image: Tensor, height: int, width: int) -> Tensor:
        """The pixels under the kernel's centres, 0 where these lie in the padding."""
        pads = []
        for axis, size in ((1, width), (0, height)):
            needed = (size - 1) * self.stride[axis] + 1
            pads += [-self.offset[axis], needed - image.shape[2 + axis] + self.offset[axis]]
        if any(pads):
            image = functional.pad(image, pads)  # negative ones crop
        return image[:, :, :: self.stride[0], :: self.stride[1]]


def _offset(conv: nn.Conv2d, axis: int) -> int:
    """Where the centre of the kernel's first place lies in the image, along `axis`."""
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
    if isinstance(conv.padding, str):
        return reach // 2 - (reach // 2 if conv.padding == "same" else 0)
    return reach // 2 - int(conv.padding[axis])


class _Reads(nn.Module):
    """Mixed into a convolution: hands its input to the skip."""

    _ghost: _Skip

    def forward(self, x: Tensor) -> Tensor:
        self._ghost.image = x
        out: Tensor = super().forward(x)
        return out


class _Adds(nn.Module):
    """Mixed into the norm behind the convolution, or what comes first within it: adds the skip to its output."""

    _ghost: _Skip
    ghost_alpha: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().forward(*args, **kwargs)
        image, self._ghost.image = self._ghost.image, None
        assert image is not None
        return out + self.ghost_alpha * self._ghost.of(image, out.shape[2], out.shape[3]).to(out.dtype)


class _Bridges(nn.Module):
    """Mixed into a convolution without a norm behind it: adds the skip to its output."""

    _ghost: _Skip
    ghost_alpha: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out + self.ghost_alpha * self._ghost.of(x, out.shape[2], out.shape[3]).to(out.dtype)


@functools.cache
def _mixed(mixin: type, kind: type) -> type:
    """A class that is `kind` and calls itself so, with `mixin` before it."""
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__, "_plain": kind})


class GhostSkips(Inserted):
    """Puts the skips in when made and takes them out at the end of the ramp; modules, names and hooks stay.

    Modules are changed by their class alone, as torch's parametrizations do: what is taken out leaves the very object.
    """

    def __init__(
        self,
        model: nn.Module,
        section: params.Recipe,
        masks: Masks,
        optimizer: torch.optim.Optimizer,
        total: int,
        steps_per_epoch: int,
        *,
        side: int,
        seed: int,
        level: int,
        start: int = 0,
    ) -> None:
        """total: steps of the level; side: of the images in pixels. Raises UserError when there is nothing to bridge.

        The same (seed, level) gives the same weights of 1x1 skips on all ranks.
        """
        ghost = section.ghost
        hold, self.end = span("recipe.ghost", ghost.hold, ghost.end, total, steps_per_epoch)
        self.ramp = Ramp(ghost.alpha, 0.0, hold, self.end, ghost.shape, _DECAY)
        self.sites = _sites(model, section, masks, side)
        first = self.sites[0].conv.weight
        self._alpha = torch.tensor(0.0, device=first.device)
        self._optimizer = optimizer
        own = ghost.kind == "1x1"
        self.weights = {site.name: _drawn(site, derive("ghost", seed, level, site.name)) for site in self.sites if own}
        self._skips = {site.name: _Skip(site.conv, self.weights.get(site.name)) for site in self.sites}
        self._in = self._over = False
        if self.weights:
            add_apart(optimizer, {f"ghost.{name}": weight for name, weight in self.weights.items()})
        self._at(start)
        self.insert()

    @property
    def parameters(self) -> int:
        """Weights of the skips themselves, counted apart from the model's."""
        return sum(weight.numel() for weight in self.weights.values())

    def before_step(self, step: int) -> None:
        """Set alpha of this step, or be over."""
        self._at(step)

    def reads_gradients(self, step: int) -> bool:
        """Never those of the model's own weights."""
        return False

    def after_backward(self, step: int) -> None:
        """Average the gradients of 1x1 skips over the ranks, which DDP knows nothing of: one reduction."""
        grads = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        if grads and not self._over:
            flat = mean_over_ranks(torch.cat([grad.reshape(-1) for grad in grads]))
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def after_step(self, step: int) -> None:
        """Remove the skips once the next step has none, so that no evaluation comes between."""
        if step + 1 >= self.end:
            self._at(step + 1)

    def epoch_end(self, epoch: int) -> dict[str, float | None]:
        """Alpha of the last step, and how many weights the skips have; empty once they are gone."""
        gone = self._over
        return {"ghost": None if gone else float(self._alpha), "ghost_weights": None if gone else self.parameters}

    def insert(self) -> None:
        """Skips in, unless training is past them."""
        if self._in or self._over:
            return
        for site in self.sites:
            alone = site.exit is site.conv
            _change(site.exit, _Bridges if alone else _Adds, self._skips[site.name])
            site.exit.register_buffer(BUFFER, self._alpha, persistent=False)
            if not alone:
                _change(site.conv, _Reads, self._skips[site.name])
        self._in = True

    def remove(self) -> None:
        """Skips out: modules are of their stock classes and hold nothing more."""
        if not self._in:
            return
        for site in self.sites:
            del site.exit._buffers[BUFFER]
            site.exit._non_persistent_buffers_set.discard(BUFFER)
            for module in {site.exit, site.conv}:
                _change_back(module)
        self._in = False

    def close(self) -> None:
        """Skips out for good, their weights out of the optimizer."""
        if self._over:
            return
        self.remove()
        self._over = True
        if self.weights:
            remove_apart(self._optimizer, list(self.weights.values()))

    def state(self) -> dict[str, Tensor]:
        """The step; weights of 1x1 skips and their optimizer state, while there are any."""
        if self._over or not self.weights:
            return at_step(self._step)
        tensors = {f"weight.{name}": w.detach().to("cpu", copy=True) for name, w in self.weights.items()}
        moments = apart_state(self._optimizer, self.weights)
        tensors |= {f"optimizer.{name}": value for name, value in moments.items()}
        return tensors | at_step(self._step)

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned; the skips go where they were gone. Raises UserError for another model's."""
        self._at(step_of(state))
        if self._over:
            return
        for name, weight in self.weights.items():
            value = state.get(f"weight.{name}")
            if value is None or value.shape != weight.shape:
                raise UserError(f"the ghost skips are another model's, first {name!r}; remove the checkpoint")
            weight.copy_(value)
        prefix = "optimizer."
        moments = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        load_apart_state(self._optimizer, self.weights, moments)

    def _at(self, step: int) -> None:
        self._step = step
        if step >= self.end:
            self.close()
        elif not self._over:
            self._alpha.fill_(self.ramp.at(step))


def check_ghost(model: nn.Module, section: params.Recipe, masks: Masks, side: int) -> None:
    """Raise UserError when there is nothing to bridge in `model`, or when `exclude` names nothing; see GhostSkips."""
    _sites(model, section, masks, side)


def _sites(model: nn.Module, section: params.Recipe, masks: Masks, side: int) -> list[Site]:
    sites = find_sites(model, _included(masks, section.ghost.exclude), side)
    if not sites:
        kind = section.ghost.kind
        raise UserError(f"recipe.ghost.kind={kind}: the network has no masked convolution to bridge; drop it")
    return sites


def _included(masks: Masks, exclude: tuple[str, ...]) -> list[str]:
    for glob in exclude:
        if not fnmatch.filter(masks, glob):
            raise UserError(f"recipe.ghost.exclude: {glob!r} matches no prunable parameter{nearest(glob, masks)}")
    return [name for name in masks if not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)]


def _drawn(site: Site, seed: int) -> nn.Parameter:
    """Weights of a 1x1 skip: normal, variance 1 / inputs, drawn on the CPU by one thread's order."""
    conv = site.conv
    inputs = conv.in_channels // conv.groups
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(conv.out_channels, inputs, 1, 1, generator=generator) * inputs**-0.5
    return nn.Parameter(drawn.to(conv.weight.device, conv.weight.dtype))


def _change(module: nn.Module, mixin: type, skip: _Skip) -> None:
    module.__dict__["_ghost"] = skip
    module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]


def _change_back(module: nn.Module) -> None:
    del module.__dict__["_ghost"]
    plain: type = module._plain  # type: ignore[assignment]
    module.__class__ = plain
