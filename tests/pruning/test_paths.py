"""Effective density against reachability in an explicit graph of pixels, and collapse."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import SqueezeExcitation

from utils import models
from utils.masks import Masks
from utils.pruning.paths import check_connected, effective
from utils.system.errors import UserError

Node = tuple[object, ...]
Edge = tuple[Node, Node, "tuple[str, tuple[int, ...]] | None"]


def random_masks(model: nn.Module, density: float, seed: int) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return Masks({n: torch.rand(m.shape, generator=generator) < density for n, m in Masks.dense(model).items()})


def without(model: nn.Module, *names: str) -> Masks:
    """All weights but those of the parameters called `names`."""
    return Masks({n: torch.zeros_like(m) if n in names else m for n, m in Masks.dense(model).items()})


def reachable(starts: Iterable[Node], after: dict[Node, list[Node]]) -> set[Node]:
    seen, todo = set(starts), list(starts)
    while todo:
        for node in after[todo.pop()]:
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return seen


def by_graph(edges: Iterable[Edge], masks: Masks) -> tuple[dict[str, torch.Tensor], bool]:
    """Weights on a path from an `in` node to an `out` node, and whether there is a path."""
    alive = [(a, b, key) for a, b, key in edges if key is None or bool(masks[key[0]][key[1]])]
    after, before = defaultdict(list), defaultdict(list)
    for a, b, _ in alive:
        after[a].append(b)
        before[b].append(a)
    nodes = {node for a, b, _ in alive for node in (a, b)}
    forward = reachable([n for n in nodes if n[0] == "in"], after)
    backward = reachable([n for n in nodes if n[0] == "out"], before)
    found = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for a, b, key in alive:
        if key is not None and a in forward and b in backward:
            found[key[0]][key[1]] = True
    return found, any(node[0] == "out" for node in forward)


def linear(source: str, target: str, name: str, outputs: int, inputs: int) -> Iterator[Edge]:
    for o, i in product(range(outputs), range(inputs)):
        yield (source, i), (target, o), (name, (o, i))


def convolution(
    source: str,
    target: str,
    name: str,
    shape: tuple[int, int, int],
    size: int,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Iterator[Edge]:
    """shape: (output channels, input channels of a group, kernel size)."""
    outputs, inputs, kernel = shape
    places = list(enumerate(range(-padding, size + padding - kernel + 1, stride)))
    for o, i, (r, top), (c, left) in product(range(outputs), range(inputs), places, places):
        channel = o // (outputs // groups) * inputs + i
        for y, x in product(range(kernel), repeat=2):
            if 0 <= top + y < size and 0 <= left + x < size:
                yield (source, channel, top + y, left + x), (target, o, r, c), (name, (o, i, y, x))


class Net(nn.Module):
    """Stem, max pooling, a bottleneck with a depthwise convolution beside a strided 1x1 shortcut, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.norm, self.pool = nn.BatchNorm2d(3), nn.MaxPool2d(2)
        self.depthwise = nn.Conv2d(3, 3, 3, stride=2, padding=1, groups=3)
        self.point = nn.Conv2d(3, 2, 1)
        self.shortcut = nn.Conv2d(3, 2, 1, stride=2)
        self.hidden, self.fc = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = self.point(torch.relu(self.depthwise(x))) + self.shortcut(x)
        return self.fc(torch.relu(self.hidden(x.mean((2, 3)))))

    @staticmethod
    def edges() -> list[Edge]:
        """For images of 4 x 4 pixels."""
        return [
            *convolution("in", "a", "stem.weight", (3, 2, 3), 4, padding=1),
            *((("a", k, r, c), ("b", k, r // 2, c // 2), None) for k, r, c in product(range(3), range(4), range(4))),
            *convolution("b", "c", "depthwise.weight", (3, 1, 3), 2, stride=2, padding=1, groups=3),
            *convolution("c", "d", "point.weight", (2, 3, 1), 1),
            *convolution("b", "d", "shortcut.weight", (2, 3, 1), 2, stride=2),
            *((("d", k, 0, 0), ("e", k), None) for k in range(2)),
            *linear("e", "f", "hidden.weight", 4, 2),
            *linear("f", "out", "fc.weight", 2, 4),
        ]


@pytest.mark.parametrize("density", [0.15, 0.3, 0.5, 0.8, 1.0])
def test_residual_network_against_reachability(density: float) -> None:
    model = Net()
    partial = connected = 0
    for seed in range(30):
        masks = random_masks(model, density, seed)
        found = effective(model, masks, (2, 4, 4))
        expected, reaches = by_graph(model.edges(), masks)
        assert found.masks == Masks(expected)
        assert found.connected == reaches
        assert found.density == sum(int(m.sum()) for m in expected.values()) / masks.total
        assert found.dead == tuple(name for name, mask in masks.items() if not mask.any())
        partial += 0 < found.masks.kept < masks.kept
        connected += found.connected
    assert connected >= (1 if density > 0.2 else 0)
    assert partial >= (0 if density == 0.15 else 1)


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_linear_layers_against_reachability(depth: int) -> None:
    model = nn.Sequential(nn.Flatten(), *(layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())))
    names = list(Masks.dense(model))
    nodes = ["in", *(f"h{i}" for i in range(depth - 1)), "out"]
    edges = [e for i, name in enumerate(names) for e in linear(nodes[i], nodes[i + 1], name, 4, 4)]
    outcomes = []
    for seed in range(40):
        masks = random_masks(model, 0.3, seed)
        found = effective(model, masks, (1, 2, 2))
        expected, reaches = by_graph(edges, masks)
        assert found.masks == Masks(expected)
        assert found.connected == reaches
        outcomes.append(reaches)
    assert any(outcomes)
    assert depth < 6 or not all(outcomes)


def test_two_hundred_layers_neither_overflow_nor_underflow() -> None:
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(8, 8) for _ in range(200)))
    assert effective(model, Masks.dense(model), (1, 2, 4)).density == 1.0
    broken = effective(model, without(model, "100.weight"), (1, 2, 4))
    assert (broken.density, broken.connected, broken.dead) == (0.0, False, ("100.weight",))


def test_a_dead_branch_beside_a_live_shortcut_is_no_disconnection() -> None:
    model = models.build("cifar/resnet20", 10, image_size=None)
    masks = without(model, "layer2.1.conv1.weight", "layer1.0.conv2.weight")
    found = effective(model, masks, (3, 32, 32))
    assert found.connected
    assert found.dead == ("layer1.0.conv2.weight", "layer2.1.conv1.weight")
    gone = {name for name, count in found.counts.items() if not count}
    assert gone == {f"{block}.conv{i}.weight" for block in ("layer1.0", "layer2.1") for i in (1, 2)}
    assert found.masks.kept == masks.kept - sum(masks.counts[name] for name in gone)
    check_connected(found, masks)


def test_disconnected_masks_are_refused_with_the_emptied_layers() -> None:
    model = models.build("cifar/vgg11_bn", 10, image_size=None)
    masks = without(model, "features.4.weight", "classifier.weight")
    found = effective(model, masks, (3, 32, 32))
    assert not found.connected
    with pytest.raises(
        UserError, match=r"emptied: features\.4\.weight, classifier\.weight\).*allow_disconnected"
    ) as error:
        check_connected(found, masks)
    assert "\n" not in str(error.value)


def test_disconnected_without_an_empty_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 1))
    masks = Masks({"1.weight": torch.tensor([[1, 1], [0, 0]]).bool(), "2.weight": torch.tensor([[0, 1]]).bool()})
    found = effective(model, masks, (1, 1, 2))
    assert (found.masks.kept, found.dead) == (0, ())
    with pytest.raises(UserError, match="no layer is empty"):
        check_connected(found, masks)


class Gated(nn.Module):
    def __init__(self, gate: type[nn.Module]) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)
        self.se = SqueezeExcitation(4, 2, scale_activation=gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.se(self.conv(x))).mean((2, 3))


@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid])
def test_a_dead_gate_still_passes_and_a_live_one_counts(gate: type[nn.Module]) -> None:
    model = Gated(gate)
    assert effective(model, Masks.dense(model), (2, 3, 3)).density == 1.0
    found = effective(model, without(model, "se.fc1.weight"), (2, 3, 3))
    assert found.connected
    # Half a gate is a constant: fc2 multiplies zeros.
    assert found.counts == {"conv.weight": 8, "out.weight": 8, "se.fc1.weight": 0, "se.fc2.weight": 0}


def test_max_pooling_lets_every_place_count() -> None:
    """On 2 x 2 pixels no output sees all nine weights of the kernel, so one path is not the whole story."""
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    edges = [
        *convolution("in", "a", "0.weight", (1, 1, 3), 2, padding=1),
        *((("a", 0, r, c), ("out", 0), None) for r, c in product(range(2), repeat=2)),
    ]
    for seed in range(10):
        masks = random_masks(model, 0.7, seed)
        assert effective(model, masks, (1, 2, 2)).masks == Masks(by_graph(edges, masks)[0])
    assert effective(model, Masks.dense(model), (1, 2, 2)).density == 1.0


class Attention(nn.Module):
    """Two tokens, the halves of the image, that only their pixels tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.view(len(x), 2, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)


def test_queries_and_keys_count_though_the_weights_are_positive() -> None:
    model = Attention()
    assert effective(model, Masks.dense(model), (1, 2, 2)).density == 1.0


def transformer() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3)
    return model.train()


def test_attention() -> None:
    model = transformer()
    dense = effective(model, Masks.dense(model), (3, 8, 8))
    assert dense.connected
    assert dense.density == 1.0
    weight = "encoder.layers.encoder_layer_1.self_attention.in_proj_weight"
    rows = Masks.dense(model)[weight].clone()
    rows[16:20] = False  # the values of the first head: nobody looks at what it attends to
    found = effective(model, Masks({**Masks.dense(model), weight: rows}), (3, 8, 8))
    assert not found.masks[weight][:4].any()  # its queries
    assert not found.masks[weight][8:12].any()  # its keys
    assert bool(found.masks[weight][4:8].all())
    assert bool(found.masks[weight][20:].all())
    projection = found.masks["encoder.layers.encoder_layer_1.self_attention.out_proj.weight"]
    assert not projection[:, :4].any()
    assert bool(projection[:, 4:].all())


def test_keys_that_are_zero_leave_the_queries_without_effect() -> None:
    model = transformer()
    weight = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    rows = Masks.dense(model)[weight].clone()
    rows[8:16] = False
    found = effective(model, Masks({**Masks.dense(model), weight: rows}), (3, 8, 8))
    assert not found.masks[weight][:16].any()
    assert bool(found.masks[weight][16:].all())


def test_a_class_token_alone_connects_nothing() -> None:
    model = transformer()
    masks = without(model, "conv_proj.weight")
    found = effective(model, masks, (3, 8, 8))
    assert not found.connected
    with pytest.raises(UserError, match="conv_proj"):
        check_connected(found, masks)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision/convnext_tiny", 64),
        ("torchvision/mobilenet_v2", 64),
        ("torchvision/mobilenet_v3_small", 64),
        pytest.param("torchvision/vit_b_16", 32, marks=pytest.mark.slow),
        pytest.param("torchvision/mobilenet_v3_small", 224, marks=pytest.mark.slow),
        pytest.param("torchvision/resnext50_32x4d", 64, marks=pytest.mark.slow),
        pytest.param("torchvision/resnet152", 64, marks=pytest.mark.slow),
        pytest.param("timm/swin_tiny_patch4_window7_224", 224, marks=pytest.mark.slow),
        pytest.param("timm/nf_resnet50", 64, marks=pytest.mark.slow),
        pytest.param("timm/efficientnet_b0", 224, marks=pytest.mark.slow),
    ],
)
def test_dense_networks_are_wholly_effective(name: str, size: int) -> None:
    """But for kernels that are larger than the image they see: weights over padding are on no path."""
    model = models.build(name, 4, image_size=size)
    found = effective(model, Masks.dense(model), (3, size, size))
    assert found.connected
    shapes = {n: p.shape for n, p in model.named_parameters()}
    partial = [n for n, count in found.counts.items() if count < shapes[n].numel()]
    assert all(len(shapes[n]) == 4 and shapes[n][2] >= 5 and size == 64 for n in partial)


def test_everything_is_left_as_it_was() -> None:
    model = Net().train()
    model.norm.eval()
    model.fc.weight.requires_grad_(False)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)

    def picture() -> list[object]:
        tensors = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in model.state_dict().values()]
        flags = [(m.training, sorted(m.__dict__)) for m in model.modules()]
        return [
            *tensors,
            flags,
            [(p.requires_grad, p.grad is None) for p in model.parameters()],
            torch.get_rng_state().sum(),
        ]

    before = picture()
    effective(model, random_masks(model, 0.5, 0), (2, 4, 4))
    assert picture() == before
    assert torch.equal(model.stem.weight.grad, torch.ones_like(model.stem.weight))


def test_weights_play_no_part() -> None:
    model = Net()
    masks = random_masks(model, 0.5, 3)
    first = effective(model, masks, (2, 4, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert effective(model, masks, (2, 4, 4)) == first


def test_needs_the_shape_and_masks_of_the_model() -> None:
    model = Net()
    with pytest.raises(UserError, match="input_shape"):
        effective(model, Masks.dense(model), None)
    with pytest.raises(UserError, match="not a prunable parameter"):
        effective(model, Masks({"other.weight": torch.ones(1).bool()}), (2, 4, 4))
