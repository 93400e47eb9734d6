"""Copies of the weights that SynFlow, the search for paths, NTK-SAP and ProsPr hold at their peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.masks import Masks
from utils.pruning.criteria import criterion
from utils.pruning.paths import effective

SHAPE = (1, 16, 16)


class Peak(TorchDispatchMode):
    """Most bytes of tensor storages, made by operations within it, alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in inputs | self.sizes.keys():
                storage = leaf.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.bytes = max(self.bytes, sum(self.sizes.values()))
        return out


def copies(call: Callable[[nn.Module, Masks], object], density: float) -> float:
    """Peak in float32 copies of the weights, themselves among them, of a net whose activations are small."""
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(256, 256), nn.Tanh())]
    model = nn.Sequential(nn.Flatten(), *layers).eval()
    masks = Masks({name: torch.rand(mask.shape) < density for name, mask in Masks.dense(model).items()})
    with Peak() as peak:
        call(model, masks)
    return 1 + peak.bytes / sum(p.numel() * p.element_size() for p in model.parameters())


def scoring(name: str, **options: Any) -> Callable[[nn.Module, Masks], object]:
    data = [(torch.ones(2, *SHAPE), torch.tensor([1, 2]))]

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    return lambda model, masks: criterion[name](model, masks, data, loss, generator=torch.Generator(), **options)


@pytest.mark.parametrize("density", [0.25, 1.0])
@pytest.mark.parametrize(
    ("call", "most"),
    [
        (scoring("synflow", input_shape=SHAPE), 5.1),
        (lambda model, masks: effective(model, masks, SHAPE), 4),
        (scoring("ntk_sap", input_shape=SHAPE, draws=2, samples=4), 6.1),
        (scoring("prospr", steps=3), 3 + 4.1),
        (scoring("prospr", steps=6), 6 + 4.1),
        (scoring("prospr", steps=6, momentum=0.9), 6 + 5.1),
        (scoring("prospr", steps=9, first_order=True), 5.1),
        (scoring("prospr", steps=9, first_order=True, momentum=0.9), 6.1),
    ],
    ids=["synflow", "paths", "ntk_sap", "prospr3", "prospr6", "momentum", "first_order", "first_order_momentum"],
)
def test_copies_of_the_weights(call: Callable[[nn.Module, Masks], object], most: float, density: float) -> None:
    found = copies(call, density)
    assert most - 2 < found <= most
