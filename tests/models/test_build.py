"""`models.build`: names, sizes, seeds."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from utils import models
from utils.system.errors import UserError
from utils.system.registry import declared


def bits(network: torch.nn.Module) -> dict[str, bytes]:
    return {name: t.contiguous().numpy().tobytes() for name, t in network.state_dict().items()}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SMALL = [
    "cifar/resnet20",
    "torchvision/squeezenet1_1",
    "torchvision/shufflenet_v2_x0_5",
    "timm/test_vit",
    "timm/test_nfnet",
]


@pytest.mark.parametrize("name", SMALL)
def test_initial_weights_depend_on_seed_name_and_classes_alone(name: str, threads: None) -> None:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    first = bits(models.build(name, 10, seed=3))
    torch.manual_seed(2)
    torch.set_num_threads(2)
    assert bits(models.build(name, 10, seed=3)) == first
    assert torch.get_num_threads() == 2
    other = bits(models.build(name, 10, seed=4))
    assert other.keys() == first.keys()
    assert other != first
    stem = next(iter(first))
    assert bits(models.build(name, 11, seed=3))[stem] != first[stem]


@pytest.mark.parametrize("name", [*SMALL, "torchvision/googlenet"])
def test_global_random_states_are_left_alone(name: str) -> None:
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002  the legacy global state is what is watched
    random.seed(7)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    models.build(name, 10, image_size=64)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


def test_a_fresh_network_is_trainable_float32_on_the_cpu() -> None:
    network = models.build("timm/test_convnext", 7, image_size=48)
    assert all(module.training for module in network.modules())
    assert {(p.dtype, p.device.type, p.requires_grad) for p in network.parameters()} == {(torch.float32, "cpu", True)}


@pytest.mark.parametrize("name", sorted(declared("model")))
def test_every_registered_network_takes_a_step(name: str) -> None:
    network = models.build(name, 10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    before = [p.detach().clone() for p in network.parameters()]
    side = 32 if "vgg" in name else 16
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    logits = network(images)
    assert logits.shape == (2, 10)
    torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in network.parameters())
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_declared_names_are_the_registered_ones() -> None:
    assert sorted(declared("model")) == models.model.names()
    expected = {f"cifar/resnet{depth}" for depth in (18, 20, 32, 34, 44, 50, 56, 101, 110, 152)}
    expected |= {f"cifar/vgg{depth}_bn{head}" for depth in (11, 13, 16, 19) for head in ("", "_head512")}
    assert set(declared("model")) == expected
    assert all(declared("model").values()), "a network without a docstring has no line in --help"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", ["model.name", "'resnet18'", "cifar/resnet18", "torchvision/<name>", "timm/<name>"]),
        ("cifar/resnet_20", ["cifar/resnet20"]),
        ("keras/resnet50", ["model.name", "'keras/resnet50'"]),
        ("torchvision/reznet18", ["torchvision/reznet18", "did you mean torchvision/resnet18"]),
        ("torchvision/zzzzzz", ["torchvision/zzzzzz", "list_models"]),
        ("torchvision/fasterrcnn_resnet50_fpn", ["detection"]),
        ("torchvision/fcn_resnet50", ["segmentation"]),
        ("torchvision/r3d_18", ["video"]),
        ("torchvision/raft_small", ["optical_flow"]),
        ("torchvision/quantized_resnet18", ["quantization"]),
        ("timm/vit_tinny_patch16_224", ["timm/vit_tinny_patch16_224", "timm/vit_tiny_patch16_224"]),
        ("timm/zzzzzz", ["timm/zzzzzz", "list_models"]),
        ("timm/hf-hub:someone/something", ["timm/hf-hub:someone/something"]),
        ("timm/resnet18.no_such_tag", ["timm/resnet18", "'no_such_tag'", "a1_in1k"]),
    ],
)
def test_unknown_names_are_refused_in_one_line(name: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        models.build(name, 10)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_names_are_checked_without_building() -> None:
    for name in ("cifar/resnet20", "torchvision/vit_h_14", "timm/vit_giant_patch14_224", "timm/resnet18.a1_in1k"):
        models.check_name(name)
    for name in ("cifar/resnet21", "resnet18", "torchvision/resnet19", "timm/resnet19x", "torchvision/raft_small"):
        with pytest.raises(UserError, match=rf"^model\.name: .*{name}"):
            models.check_name(name)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cifar/vgg11_bn", 16),
        ("torchvision/alexnet", 32),
        ("torchvision/vit_b_32", 40),
        ("torchvision/maxvit_t", 64),
        ("timm/inception_v3", 32),
        ("timm/halonet_h1", 32),
        ("timm/test_vit", 33),
    ],
)
def test_images_a_network_cannot_take_are_refused(name: str, size: int) -> None:
    with pytest.raises(UserError, match=rf"^data\.image_size: {name} cannot take {size} px images.*take another size$"):
        models.build(name, 10, image_size=size)


@pytest.mark.parametrize("output", [(torch.zeros(1, 10), torch.zeros(1)), torch.zeros(1, 9), torch.zeros(1, 10, 4, 4)])
def test_networks_without_class_scores_are_refused(output: object, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    network = torch.nn.Identity()
    network.forward = lambda _: output  # type: ignore[method-assign]
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: network)
    with pytest.raises(UserError, match=r"model\.name: timm/test_vit is not an image classifier"):
        models.build("timm/test_vit", 10, image_size=32)


def test_no_classes_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="num_classes is 0"):
        models.build("cifar/resnet20", 0)


@pytest.mark.parametrize(
    ("name", "key", "tokens"),
    [
        ("torchvision/vit_b_32", "encoder.pos_embedding", 2 * 2 + 1),
        ("timm/test_vit", "pos_embed", 4 * 4 + 1),
    ],
)
def test_image_size_shapes_positions(name: str, key: str, tokens: int) -> None:
    network = models.build(name, 10, image_size=64)
    assert network.state_dict()[key].shape[1] == tokens
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_trying_an_image_leaves_no_trace() -> None:
    tried, untried = (models.build("cifar/resnet20", 10, image_size=size) for size in (32, None))
    assert bits(tried) == bits(untried)
    assert all(p.grad is None for p in tried.parameters())
