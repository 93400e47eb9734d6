"""Small networks and a training loop that calls extensions as their contract says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from utils import params, sparsity
from utils.masks import Masks, prunable_parameters
from utils.models.cifar import ThinResNet
from utils.params.load import build
from utils.training.extension import Extension
from utils.training.optimizers import build_optimizer


def recipe(**keys: object) -> params.Recipe:
    """The section with these keys; `__` stands for the dot."""
    return build({"levels.count": 1, **{f"recipe.{k.replace('__', '.')}": v for k, v in keys.items()}}).recipe


def network(seed: int = 0, depth: int = 8) -> nn.Module:
    """A thin ResNet of 8 layers, in eval mode where BatchNorm must not move."""
    torch.manual_seed(seed)
    return ThinResNet(depth, 10)


def random_masks(model: nn.Module, density: float = 0.3) -> Masks:
    """Masks drawn weight by weight."""
    generator = torch.Generator().manual_seed(1)
    found = prunable_parameters(model)
    return Masks({name: torch.rand(p.shape, generator=generator) < density for name, p in found.items()})


def batches(count: int, size: int = 8, side: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images and labels; a batch depends on its number alone."""
    found = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(size, 3, side, side, generator=generator)
        found.append((images, torch.randint(0, 10, (size,), generator=generator)))
    return found


def plain_loss(model: Callable[[torch.Tensor], torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def optimizer_of(model: nn.Module, name: str = "sgd") -> torch.optim.Optimizer:
    """The config's optimizer, built as a level builds it."""
    section = params.Optimizer(name=name, lr=0.05 if name == "sgd" else 0.001)
    return build_optimizer(model, section, torch.device("cpu"))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    held: sparsity.Sparsity | None,
    extensions: Sequence[Extension],
    steps: range,
    loss: Callable[..., torch.Tensor] = plain_loss,
) -> list[float]:
    """The steps `steps`, each on the batch of its number; the losses."""
    shown = batches(max(steps, default=0) + 1)
    losses = []
    for step in steps:
        for extension in extensions:
            extension.before_step(step)
        value = loss(model, shown[step])
        value.backward()
        for extension in extensions:
            extension.after_backward(step)
        optimizer.step()
        for extension in extensions:
            extension.after_step(step)
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(value.detach()))
    return losses
