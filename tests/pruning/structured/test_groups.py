"""Channel groups: what goes together, what stays whole, what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.pruning.structured_cases import SHAPE, channels, half, small
from utils.pruning.structured import Channels, shrink
from utils.pruning.structured._graph import IN, OUT, Coupled, Link
from utils.pruning.structured.groups import _Builder, channel_groups
from utils.pruning.structured.verify import verified
from utils.system.errors import UserError


def parts(group) -> dict[tuple[str, str], list[int]]:
    return {(part.module, part.role): part.units.tolist() for part in group.parts}


def test_every_coupling_of_a_small_network_is_found() -> None:
    a, b, fc1, out = channel_groups(small(), SHAPE)
    assert (a.name, a.size, a.single, a.writers) == ("a", 6, True, ["a"])
    assert set(parts(a)) == {("a", "write"), ("bn", "norm"), ("b", "read"), ("c", "read")}
    # The sum ties b (through the depthwise dw) and c; the flattened map gives each channel four columns.
    assert (b.name, b.size, b.single, b.writers) == ("b", 4, False, ["b", "c"])
    assert parts(b)[("fc1", "read")] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert parts(b)[("dw", "write")] == [0, 1, 2, 3]
    assert set(parts(b)) == {("b", "write"), ("dw", "through"), ("dw", "write"), ("c", "write"), ("fc1", "read")}
    assert (fc1.name, fc1.size) == ("fc1", 5)
    assert [group.protected for group in (a, b, fc1)] == [None] * 3
    assert (out.name, out.protected) == ("fc2", "it is the output of the model")


def test_the_prunable_set_of_pruning_from_scratch_comes_out() -> None:
    """Every block's middle, no residual stream: (depth - 2) / 2 groups on thin ResNets."""
    for name, middles in (("cifar/resnet20", 9), ("cifar/resnet32", 15)):
        found = channels(name, 32)[1]
        singles = [group.name for group in found.open if group.single]
        assert len(singles) == middles
        assert all(name.endswith("conv1") and name.startswith("layer") for name in singles)
    assert len([g for g in channels("cifar/vgg16_bn", 32)[1].open if g.single]) == 13


def test_grouped_convolutions_go_by_whole_groups() -> None:
    found = {group.name: group for group in channels("torchvision/resnext50_32x4d", 64)[1].groups}
    group = found["layer1.0.conv1"]
    assert (group.size, group.single) == (32, True)
    assert parts(group)[("layer1.0.conv2", "write")] == [unit for unit in range(32) for _ in range(4)]


def test_attention_goes_by_heads() -> None:
    model, known = channels("timm/vit_tiny_patch16_224", 32)
    found = {group.name: group for group in known.groups}
    heads = found["blocks.0.attn.qkv"]
    if not hasattr(model.blocks[0].attn, "attn_dim"):  # older timm: its forward pass takes the width of its input
        assert heads.protected is not None
        return
    assert heads.size == 3
    assert parts(heads)[("blocks.0.attn.proj", "read")] == [head for head in range(3) for _ in range(64)]
    assert parts(heads)[("blocks.0.attn.qkv", "write")] == [head for head in range(3) for _ in range(64)] * 3
    stream = found["patch_embed.proj"]
    assert stream.protected is not None
    assert stream.protected.startswith("LayerNorm")


def test_groups_spanned_by_a_group_norm_are_protected() -> None:
    net = small()
    net.bn = nn.GroupNorm(2, 6)
    a = channel_groups(net, SHAPE)[0]
    assert a.protected == "GroupNorm bn takes statistics over its channels"


class Misread(nn.Module):
    """A mean over channels, which the graph takes for an element-wise operation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)  # with some weights the one unit of `a` that is kept is dead on all images of the proof
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.b(x - x.mean(1, keepdim=True)))
        return self.fc(x.mean((2, 3)))


def test_what_changes_the_function_is_found_by_trying() -> None:
    net = Misread()
    groups = channel_groups(net, SHAPE)
    assert [group.protected for group in groups][:2] == [None, None]
    found = {group.name: group.protected for group in verified(net, groups, SHAPE)}
    assert found["b"] is None
    assert found["a"] is not None
    assert found["a"].startswith("shrunk, its output differs")


def test_a_model_the_graph_cannot_follow_is_refused_by_name() -> None:
    from utils import models

    net = models.build("torchvision/shufflenet_v2_x0_5", 10, image_size=64)
    with pytest.raises(UserError, match=r"structured pruning of shuffle: its channels cannot be followed"):
        Channels.of(net, (3, 64, 64), name="shuffle")
    with pytest.raises(UserError, match=r"structured pruning of lone: no channels can be removed"):
        Channels.of(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), SHAPE, name="lone")


class Split(nn.Module):
    """A layer whose first two channels and last four go to different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(4, 3, 1)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.split(torch.relu(self.a(x)), [2, 4], 1)
        return self.fc(torch.relu(self.b(first) + self.c(second)).mean((2, 3)))


def test_a_layer_that_is_split_is_in_several_groups_of_different_names() -> None:
    """From a graph written by hand, because torch-pruning's own misreads this split."""
    every, first, last = np.arange(6), np.arange(2), np.arange(4)
    links = [Link("a", OUT, every, every), Link("b", IN, first, first), Link("c", IN, last, last + 2)]
    groups = _Builder(Split(), [Coupled("a", tuple(links), output=False)]).groups()
    assert [(group.name, group.size) for group in groups] == [("a", 2), ("a#2", 4)]
    assert parts(groups[1])[("a", "write")] == [-1, -1, 0, 1, 2, 3]
    assert parts(groups[1])[("c", "read")] == [0, 1, 2, 3]


def test_channels_the_graph_misreads_stay_and_the_others_go() -> None:
    net = Split()
    found = {group.name: group.protected for group in Channels.of(net, SHAPE).groups}
    assert found["b"] is None  # with c: a sum
    assert found["a"] == "the graph counts other channels of b than its 2"
    assert {name for name, reason in found.items() if reason is None} == {"b"}
    mask = half(Channels.of(net, SHAPE))
    smaller = shrink(net, Channels.of(net, SHAPE).groups, mask)
    assert (smaller.a.out_channels, smaller.b.out_channels, smaller.c.out_channels) == (6, 2, 2)


def test_groups_are_excluded_by_name() -> None:
    groups = channel_groups(small(), SHAPE, exclude=["f*", "a"])
    assert [group.protected for group in groups] == ["excluded", None, "excluded", "it is the output of the model"]
    with pytest.raises(UserError, match=r"structured.exclude: 'convx' matches no group"):
        channel_groups(small(), SHAPE, exclude=["convx"])


def test_looking_leaves_the_model_as_it_was() -> None:
    net = small().train()
    net.a.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(5)
    Channels.of(net, SHAPE)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert net.training
    assert not net.a.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
