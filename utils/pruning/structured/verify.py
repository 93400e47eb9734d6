"""Proof by example that a model shrinks: the smaller model is compared with the one whose channels are held at 0.0.

Dependency graphs follow most networks and misread some (a split by a fixed width, a mean over channels). So before
anything is pruned a random part of every group is taken out, a different share of each, of a copy with random norms and
in float64; groups that break the model or change its output are found by bisection and protected.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from utils.masks import bare
from utils.pruning.structured.groups import ChannelGroup
from utils.pruning.structured.mask import ChannelMask
from utils.pruning.structured.shrink import shrink
from utils.system.errors import UserError

TOLERANCE = 1e-8
MOST_PROTECTED = 48
"""More groups than these that do not shrink, and the model is refused: finding them one by one takes too long."""


def verified(
    model: nn.Module, groups: Sequence[ChannelGroup], input_shape: tuple[int, int, int], name: str = "the model"
) -> tuple[ChannelGroup, ...]:
    """`groups`, those that cannot be shrunk protected with the reason. The model is left as it is.

    Raises UserError, naming the model, when more than a few cannot, or none can.
    """
    generator = torch.Generator().manual_seed(0)
    proof = _Proof(model, groups, input_shape, generator)
    open_groups = [group for group in groups if group.protected is None]
    bad = proof.failing(open_groups, name)
    if len(bad) == len(open_groups):
        raise UserError(f"structured pruning of {name}: no channels can be removed ({next(iter(bad.values()))})")
    return tuple(replace(group, protected=bad.get(group.name, group.protected)) for group in groups)


class _Proof:
    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        input_shape: tuple[int, int, int],
        generator: torch.Generator,
    ) -> None:
        self.model = randomised(bare(model), generator)
        self.groups = list(groups)
        self.images = torch.randn(2, *input_shape, generator=generator, dtype=torch.float64)
        self.dead = {group.name: _some(group.size, number) for number, group in enumerate(groups)}

    def failing(self, groups: list[ChannelGroup], name: str) -> dict[str, str]:
        """Reasons by group name, of those of `groups` that do not shrink."""
        reason = self.reason(groups)
        if reason is None or not groups:
            return {}
        if len(groups) == 1:
            return {groups[0].name: reason}
        middle = len(groups) // 2
        found = self.failing(groups[:middle], name)
        if len(found) <= MOST_PROTECTED:
            found |= self.failing(groups[middle:], name)
        if not found:  # each half is sound, both together are not
            found = {group.name: reason for group in groups}
        if len(found) > MOST_PROTECTED:
            first, why = next(iter(found.items()))
            raise UserError(f"structured pruning of {name}: its groups do not shrink ({first}: {why})")
        return found

    @torch.no_grad()
    def reason(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Why these groups cannot be shrunk together; None when they can."""
        chosen = {group.name for group in groups}
        units = {
            group.name: self.dead[group.name] if group.name in chosen else torch.ones(group.size, dtype=torch.bool)
            for group in self.groups
        }
        mask = ChannelMask(units)
        held = copy.deepcopy(self.model)
        mask.apply_(held, self.groups)
        expected = held(self.images)
        try:
            found = shrink(self.model, self.groups, mask)(self.images)
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            return f"shrunk, it fails with {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if found.shape != expected.shape or not bool(torch.isfinite(expected).all()):
            return "its output is not finite" if found.shape == expected.shape else "its output changes shape"
        error_size = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
        return f"shrunk, its output differs by {error_size:.0e} of its size" if error_size > TOLERANCE else None


def _some(size: int, number: int) -> torch.Tensor:
    """Bool [size] that keeps about a third, a half or two thirds of the units, spread unevenly."""
    generator = torch.Generator().manual_seed(number)
    kept = max(1, min(size - 1, round(size * (1 / 3, 1 / 2, 2 / 3)[number % 3]) + number % 2))
    units = torch.zeros(size, dtype=torch.bool)
    units[torch.randperm(size, generator=generator)[:kept]] = True
    return units


@torch.no_grad()
def randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A float64 copy on the CPU in eval mode, in which no norm is the identity and no parameter constant."""
    copied = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
    for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
        elif name.endswith("running_mean") or (tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())):
            base = 1.0 if isinstance(tensor, nn.Parameter) and bool((tensor == 1).all()) else 0.0
            tensor.copy_(base + 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return copied
