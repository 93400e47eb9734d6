"""Which reduction is chosen, and which entries of a bucket go (tests/distributed has the sums themselves)."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from utils import params, sparsity
from utils.masks import Masks
from utils.params.load import build
from utils.system.distributed import World
from utils.system.errors import ParamError
from utils.training.reduction import PackedReduction, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ONE_NODE, TWO_NODES = World(1, 4, 1, 4), World(3, 4, 1, 2)


@pytest.mark.parametrize(
    ("reduction", "place", "device", "chosen"),
    [
        ("auto", ONE_NODE, CPU, "dense"),
        ("auto", TWO_NODES, CPU, "packed"),
        ("auto", World(2, 3, 0, 1), CPU, "packed"),
        ("auto", TWO_NODES, CUDA, "dense"),
        ("packed", ONE_NODE, CPU, "packed"),
        ("packed", TWO_NODES, CUDA, "packed"),
        ("dense", TWO_NODES, CPU, "dense"),
    ],
)
def test_the_choice_follows_from_the_config_and_the_nodes(
    reduction: str, place: World, device: torch.device, chosen: str
) -> None:
    section = params.Distributed(reduction=reduction)
    assert choose(section, place, device) == chosen
    # Nothing of one rank's own goes into it.
    others = {
        choose(section, World(r, place.size, r % place.local_size, place.local_size), device) for r in range(place.size)
    }
    assert others == {chosen}


def test_auto_over_nccl_is_dense() -> None:
    assert choose(params.Distributed(backend="nccl"), TWO_NODES, CPU) == "dense"


@pytest.mark.parametrize(
    ("key", "value"),
    [("reduction", "sparse"), ("packed_below", 0.0), ("packed_below", 1.5), ("packed_below", "auto")],
)
def test_values_that_cannot_be_name_their_key(key: str, value: object) -> None:
    with pytest.raises(ParamError, match=rf"distributed\.{key}"):
        build({"levels.count": 1, f"distributed.{key}": value})


# Entries of a bucket ----------------------------------------------------------------------------------------------


@dataclass
class Bucket:
    """What the hook reads of DDP's own."""

    held: list[Tensor]
    number: int = 0
    flat: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.flat = torch.zeros(sum(p.numel() for p in self.held))

    def parameters(self) -> list[Tensor]:
        return self.held

    def buffer(self) -> Tensor:
        return self.flat

    def index(self) -> int:
        return self.number


def held_network(kept: Tensor) -> tuple[nn.Conv2d, sparsity.Sparsity]:
    model = nn.Conv2d(2, 3, 2)
    model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
    return model, sparsity.attach(model, None, Masks({"weight": kept}))


def indices(packing: PackedReduction, bucket: Bucket) -> list[int] | None:
    plan = packing._plan(bucket, bucket.buffer())  # type: ignore[arg-type]
    return None if plan.index is None else plan.index.tolist()


def memory_places(weight: Tensor, kept: Tensor) -> list[int]:
    """Offsets of the kept entries in the weight's memory, from its strides, place by place."""
    return sorted(
        sum(int(i) * s for i, s in zip(place, weight.stride(), strict=True)) for place in kept.nonzero().tolist()
    )


def test_entries_are_in_the_order_of_memory_and_biases_go_whole() -> None:
    torch.manual_seed(0)
    kept = torch.rand(3, 2, 2, 2) < 0.4
    model, held = held_network(kept)
    packing = PackedReduction(2, packed_below=1.0)
    packing.follow(held)
    weights = memory_places(model.weight, kept)
    assert weights != kept.flatten().nonzero().flatten().tolist()
    assert indices(packing, Bucket([model.bias, model.weight])) == [0, 1, 2, *(3 + place for place in weights)]
    # DDP's rebuilt bucket of the same number and size, in another order.
    assert indices(packing, Bucket([model.weight, model.bias])) == [*weights, 24, 25, 26]


def test_masks_are_followed_and_dense_gradients_go_whole() -> None:
    kept = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    model, held = held_network(kept)
    packing, bucket = PackedReduction(2, packed_below=1.0), Bucket([model.weight])
    assert indices(packing, bucket) is None  # nothing to follow yet
    packing.follow(held)
    assert indices(packing, bucket) == []
    kept = kept.clone()
    kept[0, 0, 0, 0] = True
    held.set(Masks({"weight": kept}))
    assert indices(packing, bucket) == [0]
    held.dense_gradients(True)
    assert indices(packing, bucket) is None
    held.dense_gradients(False)
    assert indices(packing, bucket) == [0]
    held.set(Masks({"weight": torch.ones_like(kept)}))
    assert indices(packing, bucket) is None


def test_other_masks_of_the_same_number_are_followed() -> None:
    """Of two Sparsity objects each counts its own changes."""
    kept = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    model, held = held_network(kept)
    packing, bucket = PackedReduction(2, packed_below=1.0), Bucket([model.weight])
    packing.follow(held)
    assert indices(packing, bucket) == []
    kept[0, 0, 0, 0] = True
    other = sparsity.attach(model, None, Masks({"weight": kept}))
    assert other.version == held.version
    packing.follow(other)
    assert indices(packing, bucket) == [0]


@pytest.mark.parametrize(("below", "packed"), [(0.4, False), (0.5, True), (0.6, True)])
def test_buckets_above_the_density_go_whole(below: float, packed: bool) -> None:
    kept = torch.arange(24).reshape(3, 2, 2, 2) % 2 == 0
    model, held = held_network(kept)
    packing = PackedReduction(2, packed_below=below)
    packing.follow(held)
    assert (indices(packing, Bucket([model.weight])) is not None) == packed


def test_a_bucket_of_other_entries_is_refused() -> None:
    model, held = held_network(torch.zeros(3, 2, 2, 2, dtype=torch.bool))
    packing, bucket = PackedReduction(2, packed_below=1.0), Bucket([model.weight])
    packing.follow(held)
    bucket.flat = torch.zeros(32)
    with pytest.raises(RuntimeError, match="bucket holds other entries"):
        indices(packing, bucket)


def test_stored_masks_of_weights_with_gaps_and_of_strangers() -> None:
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = torch.zeros(2, 6)[:, ::2]
    kept = torch.tensor([[True, False, True], [False, False, True]])
    held = sparsity.attach(model, None, Masks({"weight": kept}))
    stored = held.stored(model.weight)
    assert stored is not None
    assert stored.tolist() == kept.flatten().tolist()
    assert held.stored(nn.Parameter(torch.zeros(2, 3))) is None
