"""Copies of the weights that gradient criteria hold at their peak."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.masks import Masks
from utils.pruning.criteria import criterion

Batch = tuple[Tensor, Tensor]


def drawn(model: nn.Module, density: float) -> Masks:
    generator = torch.Generator().manual_seed(5)
    masks = Masks({n: torch.rand(m.shape, generator=generator) < density for n, m in Masks.dense(model).items()})
    assert 0 < masks.kept <= masks.total  # counted here: the counter would take numpy's view of a mask for a new tensor
    return masks


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


class Alive(TorchDispatchMode):
    """Bytes of all tensor storages alive at once, those given at the start among them."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in given:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.fixture
def wide() -> tuple[nn.Module, list[Batch]]:
    """A net whose weights outweigh its activations and every other tensor by far."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.Tanh())))
    return model, [(torch.randn(2, 256), torch.tensor([3, 200])) for _ in range(3)]


def test_the_counter_sees_what_lives_and_dies() -> None:
    with Alive([]) as alive:
        kept = torch.ones(1000)
        _ = [torch.ones(1000) + 1 for _ in range(5)]
        del _
        torch.ones(1000).view(10, 100).t()
    assert (alive.now, alive.peak) == (4000, 4000 * 7)
    assert kept.sum() == 1000


@pytest.mark.parametrize(("name", "copies"), [("taylor", 4), ("snip", 4), ("fisher", 4), ("grasp", 8), ("crop", 8)])
@pytest.mark.parametrize("density", [0.25, 1.0])
def test_copies_of_the_weights(wide: tuple[nn.Module, list[Batch]], name: str, copies: int, density: float) -> None:
    model, batches = wide
    masks, entry = drawn(model, density), criterion.entry(name)
    one = sum(p.numel() * p.element_size() for p in model.parameters())
    with Alive(list(model.parameters())) as alive:
        scores = entry.value(model, masks, batches, cross_entropy, generator=torch.Generator())
    assert alive.peak <= copies * one
    assert alive.peak >= 2 * one
    assert len(scores) == 8
