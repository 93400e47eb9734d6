"""The positive network: what SynFlow and the search for paths run instead of the network itself.

Every parameter is replaced by a non-negative float64 one, biases by zero and normalisation layers by the identity, and
one image goes through. A network of convolutions, linear layers, ReLU and pooling then computes sums of products along
its paths from input to output.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from utils.system.errors import UserError

_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
_FOREIGN_NORMS = {
    "torchvision.ops.misc": ("FrozenBatchNorm2d",),
    "timm.layers.norm": (
        *("RmsNorm", "RmsNormFp32", "RmsNorm2d", "RmsNorm2dFp32"),
        *("SimpleNorm", "SimpleNormFp32", "SimpleNorm2d", "SimpleNorm2dFp32"),
    ),
    "timm.layers.norm_act": ("FrozenBatchNormAct2d",),
    "timm.layers.grn": ("GlobalResponseNorm",),
    "timm.layers.evo_norm": (
        *("EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2"),
        *("EvoNorm2dS0", "EvoNorm2dS1", "EvoNorm2dS2"),
    ),
    "timm.layers.filter_response_norm": ("FilterResponseNormTlu2d", "FilterResponseNormAct2d"),
    "timm.layers.inplace_abn": ("InplaceAbn",),
}
_STANDARDISED = {
    "timm.layers.std_conv": ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"),
}
"""Convolutions that normalise their weights."""


def _known(classes: Mapping[str, tuple[str, ...]]) -> tuple[type[nn.Module], ...]:
    """The classes of libraries that are loaded: a model that has such a layer has imported its module."""
    return tuple(
        getattr(sys.modules[home], name)
        for home, names in classes.items()
        if home in sys.modules
        for name in names
        if hasattr(sys.modules[home], name)
    )


@contextlib.contextmanager
def replaced(forwards: Sequence[tuple[nn.Module, Callable[..., Tensor]]]) -> Iterator[None]:
    """Modules compute the given functions within it: `forward` is shadowed by an attribute of the instance."""
    aside: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in forwards:
            aside.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, own in reversed(aside):
            del module.__dict__["forward"]
            if own is not None:
                module.forward = own


@contextlib.contextmanager
def neutral(model: nn.Module) -> Iterator[None]:
    """Eval mode with normalisation layers as identity and clipped ReLUs (ReLU6, Hardtanh from 0) without their clip.

    Layers of norm and activation keep the activation and the dropout; convolutions that standardise their weights use
    them as they are. The clip goes because without norms nearly all
    activations lie beyond it, where its gradient is 0: MobileNetV2 would score 0 in 52 of its 53 layers.
    Training flags are restored.
    """
    norms, convolutions = _NORMS + _known(_FOREIGN_NORMS), _known(_STANDARDISED)
    forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
    for module in model.modules():
        if isinstance(module, norms):
            forwards.append((module, _identity(module)))
        elif isinstance(module, convolutions):
            forwards.append((module, _plain(module)))
        elif isinstance(module, nn.Hardtanh) and module.min_val == 0:
            forwards.append((module, torch.relu))
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with replaced(forwards):
            yield
    finally:
        for module, training in flags:
            module.training = training


def _identity(norm: nn.Module) -> Callable[..., Tensor]:
    """The input as a fresh tensor (what follows may work in place), through the layer's own dropout and activation."""
    after = [layer for layer in (getattr(norm, "drop", None), getattr(norm, "act", None)) if callable(layer)]

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        x = x.clone()
        for layer in after:
            x = layer(x)
        return x

    return forward


def _plain(layer: nn.Module) -> Callable[..., Tensor]:
    """A convolution by the layer's own weights, with its own padding."""
    assert isinstance(layer, nn.Conv2d)

    def forward(x: Tensor) -> Tensor:
        if getattr(layer, "same_pad", False):
            from timm.layers.padding import pad_same

            x = pad_same(x, list(layer.kernel_size), list(layer.stride), list(layer.dilation))
        return layer._conv_forward(x, layer.weight, layer.bias)

    return forward


def ones(model: nn.Module, input_shape: tuple[int, int, int] | None, user: str) -> Tensor:
    """One image of ones [1, C, H, W], float64, on the model's device. UserError, naming `user`, without a shape."""
    if input_shape is None:
        raise UserError(f"{user} runs the network and needs input_shape=(channels, height, width)")
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    return torch.ones((1, *input_shape), dtype=torch.float64, device=device)


def is_bias(name: str) -> bool:
    """Whether the parameter called `name` is an additive constant: its name ends in `bias`."""
    return name.endswith("bias")


def flow(
    model: nn.Module,
    values: Mapping[str, Tensor],
    image: Tensor,
    each: Callable[[str, Tensor, Tensor], None],
    scale: float = 1.0,
) -> Tensor:
    """The sum of the outputs for `image` with the parameters `values`; differentiates `scale` times that sum.

    values: float64, by parameter name; all parameters. each: called with (name, value, gradient) for every value that
    requires a gradient and that the sum depends on, as soon as that gradient is complete; the gradient belongs to the
    callee, so that no second copy of the weights need be alive. Buffers are float64 copies, the model is not touched.
    image may require a gradient too; it is left in `image.grad`. Raises UserError for outputs that are no tensor.
    """
    buffers = {name: b.double() if b.is_floating_point() else b.clone() for name, b in model.named_buffers()}
    handles = [
        value.register_post_accumulate_grad_hook(_handed(name, each))
        for name, value in values.items()
        if value.requires_grad
    ]
    try:
        with torch.enable_grad():
            output = functional_call(model, {**buffers, **values}, (image,))
            if not isinstance(output, Tensor):
                raise UserError(
                    f"model.name: the network returns a {type(output).__name__}, not one tensor; "
                    "its paths cannot be followed, choose a plain image classifier"
                )
            total = output.sum()
        if total.requires_grad:
            total.backward(torch.full_like(total, scale))
    finally:
        for handle in handles:
            handle.remove()
    return total.detach()


def _handed(name: str, each: Callable[[str, Tensor, Tensor], None]) -> Callable[[Tensor], None]:
    def hand(value: Tensor) -> None:
        gradient, value.grad = value.grad, None
        assert gradient is not None
        each(name, value.detach(), gradient)

    return hand
