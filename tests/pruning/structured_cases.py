"""Networks and batches the tests of channel pruning share."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional

from utils import models
from utils.pruning.structured import ChannelMask, Channels


class Small(nn.Module):
    """Two convolutions, a depthwise one, a residual sum and a linear layer behind a flattened map of 2x2."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 4, 1, bias=False)
        self.dw = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.c = nn.Conv2d(6, 4, 1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc1 = nn.Linear(16, 5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.silu(self.bn(self.a(x)))
        x = self.dw(self.b(x)) + self.c(x)
        return self.fc2(torch.sigmoid(self.fc1(self.pool(x).flatten(1))))


SHAPE = (3, 8, 8)


def small(seed: int = 0) -> Small:
    """The same weights for the same seed; its norm is not the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Small()
        nn.init.normal_(net.bn.weight, 1.0, 0.3)
        nn.init.normal_(net.bn.bias, 0.0, 0.3)
    return net


@functools.cache
def channels(name: str, side: int) -> tuple[nn.Module, Channels]:
    """A network for ten classes and its channels."""
    model = models.build(name, 10, image_size=side)
    return model, Channels.of(model, (3, side, side), name=name)


def half(channels: Channels, seed: int = 0) -> ChannelMask:
    """A random half of every group's units, rounded up, at least one less than all."""
    generator, units = torch.Generator().manual_seed(seed), {}
    for group in channels.groups:
        units[group.name] = torch.ones(group.size, dtype=torch.bool)
        if group.protected is None:
            units[group.name][torch.randperm(group.size, generator=generator)[(group.size + 1) // 2 :]] = False
    return ChannelMask(units)


def batch(shape: tuple[int, int, int], classes: int, size: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, *shape, generator=generator), torch.randint(0, classes, (size,), generator=generator)


def cross_entropy(model: nn.Module, images_and_labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy."""
    return functional.cross_entropy(model(images_and_labels[0]), images_and_labels[1])
