"""How the published harness trains a masked network, written from its description, as a peer for measurements.

Every masked layer keeps its mask as a float32 buffer and multiplies the weight by it in every forward pass; linear
layers become 1x1 convolutions of one dimension. The network stays in NCHW order, the optimizer is torch's with no
option on how it loops, and every step reads loss and accuracy back to the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.masks import Masks


class ConvMask(nn.Conv2d):
    """A convolution whose weight is multiplied by its mask in the forward pass."""

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to maps."""
        return self._conv_forward(x, self.mask.to(self.weight.device) * self.weight, self.bias)


class LinearMask(nn.Linear):
    """A linear layer that does the same."""

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return functional.linear(x, self.mask.to(self.weight.device) * self.weight, self.bias)


class Conv1dMask(nn.Linear):
    """A linear layer as a masked convolution of length 1 over [B, inputs, 1]."""

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs] to [B, outputs]."""
        weight = (self.mask.to(self.weight.device) * self.weight)[:, :, None]
        return functional.conv1d(x[:, :, None], weight, self.bias)[:, :, 0]


def multiply_in_forward(model: nn.Module, masks: Masks, linear: type[nn.Linear] = LinearMask) -> nn.Module:
    """Let every masked layer of `model` (Conv2d, Linear) multiply by its mask, in place; weights stay as they are."""
    kinds = {nn.Conv2d: ConvMask, nn.Linear: linear}
    for name, mask in masks.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        weight = model.get_parameter(name)
        module.__class__ = kinds[type(module)]  # type: ignore[assignment]
        module.register_buffer("mask", torch.empty_like(weight, requires_grad=False).copy_(mask))
    return model


def harness_step(
    model: nn.Module, masks: Masks, batch: tuple[Tensor, Tensor], dtype: torch.dtype, lr: float
) -> Callable[[], None]:
    """One training step of the published harness on a batch that lies on the device; the model becomes its own."""
    model = multiply_in_forward(model, masks, Conv1dMask).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    images, labels = batch
    seen = {"loss": 0.0, "correct": 0.0, "samples": 0}

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            outputs = model(images)
            loss = functional.cross_entropy(outputs, labels)
        loss.backward()
        optimizer.step()
        seen["loss"] += loss.item()
        seen["correct"] += outputs.argmax(1).eq(labels).sum().item()
        seen["samples"] += len(labels)

    return step
