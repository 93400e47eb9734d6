"""SynFlow against sums over enumerated paths, its conservation law, and that it leaves the model alone."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import nn

from utils import models
from utils.masks import Masks
from utils.pruning.criteria import criterion
from utils.pruning.criteria.synflow import synflow
from utils.system.errors import UserError

Node = tuple[object, ...]
Key = tuple[str, tuple[int, ...]]


def scores(model: nn.Module, shape: tuple[int, int, int], masks: Masks | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return synflow(
        model, masks or Masks.dense(model), (), lambda *_: torch.zeros(()), generator=generator, input_shape=shape
    )


def state(model: nn.Module) -> str:
    """Digest of every bit, flag, gradient and instance attribute that scoring might touch."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        sha.update(f"{name} {module.training} {sorted(module.__dict__)} {len(module._forward_hooks)}".encode())
    for name, parameter in model.named_parameters():
        sha.update(f"{name} {parameter.requires_grad} {parameter.grad is None} {parameter.dtype}".encode())
    return sha.hexdigest()


class Small(nn.Module):
    """A grouped convolution beside an identity, norms, biases, a strided 1x1 convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.branch = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.down = nn.Conv2d(3, 2, 1, stride=2, bias=False)
        self.fc = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.branch(x))
        return self.fc(self.down(x).mean((2, 3)))


def convolution(
    source: str,
    target: str,
    name: str,
    weight: torch.Tensor,
    size: int,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Iterator[tuple[Node, Node, float, Key | None]]:
    """Edges of a convolution on size x size images, from its definition."""
    outputs, inputs, high, wide = weight.shape
    reach = range(0, size + 2 * padding - high + 1, stride)
    for o, i, (r, top), (c, left) in product(range(outputs), range(inputs), enumerate(reach), enumerate(reach)):
        for y, x in product(range(high), range(wide)):
            row, column = top + y - padding, left + x - padding
            if 0 <= row < size and 0 <= column < size:
                channel = o // (outputs // groups) * inputs + i
                yield (
                    (source, channel, row, column),
                    (target, o, r, c),
                    float(weight[o, i, y, x].abs()),
                    (name, (o, i, y, x)),
                )


def path_sums(model: Small, masks: Masks) -> dict[Key, float]:
    """For every weight the sum, over all paths through it, of the products of |w| m along the path."""
    w = {name: p.detach().double() * masks[name] for name, p in model.named_parameters() if name in masks}
    edges = [
        *convolution("in", "a", "stem.weight", w["stem.weight"], 3, padding=1),
        *convolution("a", "b", "branch.weight", w["branch.weight"], 3, padding=1, groups=3),
        *((("a", *at), ("b", *at), 1.0, None) for at in product(range(3), repeat=3)),
        *convolution("b", "c", "down.weight", w["down.weight"], 3, stride=2),
        *((("c", k, r, c), ("mean", k), 0.25, None) for k, r, c in product(range(2), repeat=3)),
        *(
            (("mean", i), ("out", o), float(w["fc.weight"][o, i].abs()), ("fc.weight", (o, i)))
            for i, o in product(range(2), repeat=2)
        ),
    ]
    after = defaultdict(list)
    for source, target, value, key in edges:
        after[source].append((target, value, key))
    sums: dict[Key, float] = defaultdict(float)

    def walk(node: Node, product_: float, through: tuple[Key, ...]) -> None:
        if node[0] == "out":
            for key in through:
                sums[key] += product_
        for target, value, key in after[node]:
            if value:
                walk(target, product_ * value, (*through, key) if key else through)

    for at in product(range(2), range(3), range(3)):
        walk(("in", *at), 1.0, ())
    return sums


@pytest.mark.parametrize("density", [1.0, 0.6])
def test_scores_are_sums_over_paths(density: float) -> None:
    torch.manual_seed(3)
    model = Small()
    masks = Masks({n: torch.rand(m.shape) < density for n, m in Masks.dense(model).items()})
    found, expected = scores(model, (2, 3, 3), masks), path_sums(model, masks)
    assert len(expected) > 20
    for name, score in found.items():
        assert score.dtype == torch.float64
        for index in product(*map(range, score.shape)):
            assert float(score[index]) == pytest.approx(expected.get((name, index), 0.0), rel=1e-12, abs=0)


def test_flow_is_conserved_over_every_cut_of_a_resnet() -> None:
    """R from an independent run: torch's own layers on a copy with |w|, zero biases and no norms."""
    model = models.build("cifar/resnet18", 10, image_size=None)
    before = state(model)
    sums = {name: float(score.sum()) for name, score in scores(model, (3, 32, 32)).items()}
    assert state(model) == before

    copy = models.build("cifar/resnet18", 10, image_size=None).double().eval()
    for module in list(copy.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, key, nn.Identity())
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.abs_() if name.endswith("weight") else parameter.zero_()
        total = float(copy(torch.ones(1, 3, 32, 32, dtype=torch.float64)).sum())
    assert 1e26 < total < 1e29
    branch, shortcut = sums["layer2.0.conv1.weight"], sums["layer2.0.downsample.0.weight"]
    assert sums["fc.weight"] == pytest.approx(total, rel=1e-10)
    assert sums["conv1.weight"] == pytest.approx(total, rel=1e-10)
    assert branch + shortcut == pytest.approx(total, rel=1e-10)
    assert sums["layer2.0.conv2.weight"] == pytest.approx(branch, rel=1e-10)
    assert branch > shortcut > 0


def test_resnet50_is_finite() -> None:
    found = scores(models.build("torchvision/resnet50", 10, image_size=None), (3, 64, 64))
    total = float(found["fc.weight"].sum())
    assert total > 3.5e38  # more than float32 can hold
    assert float(found["conv1.weight"].sum()) == pytest.approx(total, rel=1e-9)
    assert all(bool(score.isfinite().all()) and float(score.min()) >= 0 for score in found.values())


class Chain(nn.Module):
    """Widths of one: R is the product of all weights."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in values)
        for layer, value in zip(self.layers, values, strict=True):
            nn.init.constant_(layer.weight, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@pytest.mark.parametrize("exponent", [60, 104, 124])
def test_overflow_of_float64_is_scaled_by_a_power_of_two(exponent: int) -> None:
    """12 layers of 2^exponent beside a branch: 2^720 fits, 2^1248 and 2^1488 do not."""
    model = nn.ModuleDict({"wide": Chain([2.0**exponent] * 12), "narrow": Chain([3.0, *[2.0**exponent] * 11])})
    net = Sum(model)
    found = scores(net, (1, 1, 1))
    wide, narrow = (float(found[f"parts.{k}.layers.0.weight"]) for k in ("wide", "narrow"))
    assert 0 < wide < float("inf")
    assert narrow / wide == 3.0 * 2.0**-exponent
    assert all(float(found[f"parts.wide.layers.{i}.weight"]) == wide for i in range(12))


class Sum(nn.Module):
    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([part(x) for part in self.parts.values()]).sum(0)


def test_gradient_overflow_alone_scales_only_the_output() -> None:
    """An activation of 2^-300 then 2^1200: R = 2^900 fits, dR/d(middle) = 2^1200 does not."""
    found = scores(Chain([2.0**-100] * 3 + [2.0**120] * 10), (1, 1, 1))
    values = {float(score) for score in found.values()}
    assert values == {2.0 ** (900 - 512)}


def test_hopeless_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"pruning\.criterion=synflow.*not finite"):
        scores(Chain([1.0, float("inf")]), (1, 1, 1))
    with pytest.raises(UserError, match=r"not finite"):
        scores(Chain([2.0**120] * 20), (1, 1, 1))


def test_a_head_of_zeros_scores_zero() -> None:
    found = scores(Chain([1.0, 0.0]), (1, 1, 1))
    assert [float(score) for score in found.values()] == [0.0, 0.0]


def test_masks_that_disconnect_score_zero() -> None:
    model = Chain([1.0, 2.0])
    masks = Masks({"layers.0.weight": torch.ones(1, 1).bool(), "layers.1.weight": torch.zeros(1, 1).bool()})
    assert all(float(score) == 0.0 for score in scores(model, (1, 1, 1), masks).values())


def test_needs_the_shape_and_one_tensor() -> None:
    model = Chain([1.0])
    with pytest.raises(UserError, match="input_shape"):
        synflow(model, Masks.dense(model), (), lambda *_: torch.zeros(()), generator=torch.Generator())
    model.forward = lambda x: (x, x)  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(UserError, match="returns a tuple"):
        scores(model, (1, 1, 1))


def test_published_rounds() -> None:
    traits = criterion.entry("synflow").traits
    assert (traits["rounds"], traits["schedule"], traits["reads"]) == (100, "exponential", "nothing")


def test_norms_dropout_and_biases_have_no_part_and_inplace_activations_do_no_harm() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
    rich = nn.Sequential(
        nn.Flatten(),
        nn.LayerNorm(4),
        nn.Linear(4, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.GroupNorm(1, 5),
        nn.RMSNorm(5),
        nn.Linear(5, 2),
    ).train()
    rich[2].weight, rich[8].weight = plain[1].weight, plain[3].weight
    before = state(rich)
    a, b = scores(plain, (1, 2, 2)), scores(rich, (1, 2, 2))
    assert state(rich) == before
    assert torch.equal(a["1.weight"], b["2.weight"])
    assert torch.equal(a["3.weight"], b["8.weight"])


def test_timm_norms_keep_their_activation() -> None:
    from timm.layers import BatchNormAct2d, GroupNormAct, LayerNorm2d

    for norm in (
        BatchNormAct2d(3, act_layer=nn.GELU),
        GroupNormAct(3, num_groups=1, act_layer=nn.GELU),
        LayerNorm2d(3),
    ):
        torch.manual_seed(0)
        first, last = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)
        middle = [] if isinstance(norm, LayerNorm2d) else [nn.GELU()]
        found = scores(nn.Sequential(first, norm, last), (2, 2, 2))
        expected = scores(nn.Sequential(first, *middle, last), (2, 2, 2))
        assert torch.equal(found["0.weight"], expected["0.weight"])


def test_preactivation_with_an_inplace_activation_leaves_the_shortcut_alone() -> None:
    class Block(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.conv = nn.Conv2d(1, 1, 1, bias=False)
            self.norm, self.act = nn.BatchNorm2d(1), nn.SiLU(inplace=inplace)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x + self.act(self.norm(x))

    assert torch.equal(*(scores(Block(inplace), (1, 1, 1))["conv.weight"] for inplace in (True, False)))


LARGE = [
    ("torchvision/vit_b_16", 32),
    ("torchvision/convnext_tiny", 32),
    ("torchvision/resnext50_32x4d", 32),
    ("torchvision/mobilenet_v2", 64),
    ("torchvision/densenet121", 32),
    ("timm/nf_resnet50", 64),
    ("timm/vit_tiny_patch16_224", 32),
    ("timm/resnetv2_50", 64),
    ("timm/efficientnet_b0", 64),
]


def check_runs(name: str, size: int) -> dict[str, torch.Tensor]:
    model = models.build(name, 4, image_size=size)
    if name == "torchvision/vit_b_16":  # its head starts at zero, and all scores with it
        nn.init.normal_(model.get_parameter("heads.head.weight"), std=0.02)
    before = state(model)
    found = scores(model, (3, size, size))
    assert state(model) == before
    assert found.keys() == Masks.dense(model).keys()
    assert all(bool(score.isfinite().all()) and float(score.min()) >= 0 for score in found.values())
    return found


def test_runs_on_mobilenet_v3() -> None:
    found = check_runs("torchvision/mobilenet_v3_small", 64)
    dead = [name for name, score in found.items() if not score.any()]
    assert all(".fc1." in name or ".fc2." in name for name in dead)  # saturated hard sigmoids alone


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), LARGE)
def test_runs_on_large_networks(name: str, size: int) -> None:
    found = check_runs(name, size)
    silent = [n for n, score in found.items() if not score.any()]
    assert [n for n in silent if ".se." not in n] == []
