"""Optimizers against the papers' update rules in numpy; groups and state by name."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from utils import params
from utils.system.errors import ParamError, UserError
from utils.system.registry import declared
from utils.training.optimizers import (
    build_optimizer,
    decayed_names,
    load_optimizer_state,
    optimizer,
    optimizer_state,
    sgd,
)

CPU = torch.device("cpu")
NAMES = ["adam", "adamw", "sgd"]


class Tiny(nn.Module):
    """A bit of everything: norms in and out of Sequential, a depthwise convolution, attention, loose tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.downsample = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.group_norm = nn.GroupNorm(2, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 8))
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)
        self.norm = nn.LayerNorm((17, 8))
        self.positions = nn.ModuleDict({"pos_table": nn.Embedding(17, 8)})
        self.mixer = nn.Parameter(torch.randn(8, 8) * 0.1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.group_norm(self.depthwise(self.downsample(self.stem(x)))) * self.scale
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], 1)
        x = self.norm(x + self.pos_embed + self.positions["pos_table"].weight)
        x = self.attention(x, x, x, need_weights=False)[0] @ self.mixer
        return self.head(x[:, 0])


TINY_DECAYED = [
    "mixer",
    "stem.weight",
    "downsample.0.weight",
    "depthwise.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "head.weight",
]


def tiny(channels_last: bool = False) -> Tiny:
    torch.manual_seed(0)
    model = Tiny()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Strides that matter: those of dimensions longer than 1."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 3, 4, 4)).square().mean().backward()
        optimizer.step()


def section(name: str, **fields: Any) -> params.Optimizer:
    return params.Optimizer(name=name, lr=0.01, weight_decay=0.02, **fields)


def vector_run(part: params.Optimizer, gradients: np.ndarray) -> np.ndarray:
    """A parameter of three numbers under the section's optimizer, given these gradients."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))})
    built = build_optimizer(model, part, CPU)
    for gradient in gradients:
        model["w"].grad = torch.tensor(gradient, dtype=torch.float32)
        built.step()
    return model["w"].detach().numpy()


GRADIENTS = np.array([[0.3, -0.1, 2.0], [-0.2, 0.4, 1.0], [0.1, 0.1, -3.0], [0.5, -0.7, 0.0]])


def test_names_read_from_source_are_the_registered_ones() -> None:
    assert sorted(declared("optimizer")) == optimizer.names() == NAMES


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_update_rule(nesterov: bool, momentum: float) -> None:
    if nesterov and momentum == 0.0:
        with pytest.raises(ParamError, match=r"optimizer\.nesterov"):
            vector_run(section("sgd", nesterov=True, momentum=0.0), GRADIENTS)
        return
    w, velocity = np.array([1.0, -2.0, 0.5]), np.zeros(3)
    for gradient in GRADIENTS:
        g = gradient + 0.02 * w
        velocity = momentum * velocity + g
        w = w - 0.01 * (g + momentum * velocity if nesterov else velocity)
    np.testing.assert_allclose(
        vector_run(section("sgd", nesterov=nesterov, momentum=momentum), GRADIENTS), w, rtol=1e-6
    )


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_update_rules(name: str) -> None:
    part = section(name, betas=(0.8, 0.95), eps=1e-6)
    w, m, v = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3)
    for t, gradient in enumerate(GRADIENTS, start=1):
        g = gradient + (0.02 * w if name == "adam" else 0.0)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        update = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
        w = w - 0.01 * update - (0.01 * 0.02 * w if name == "adamw" else 0.0)
    np.testing.assert_allclose(vector_run(part, GRADIENTS), w, rtol=1e-5)


def test_fused_sgd_survives_a_skipped_first_step() -> None:
    """Loss scaling skips the first step: momentum must then start at 0, not at whatever the memory held."""
    p = nn.Parameter(torch.ones(4096))
    built = sgd([{"params": [p]}], section("sgd"), torch.device("cuda"))
    for skipped in (1.0, 0.0):
        p.grad = torch.full_like(p, 0.5)
        built.grad_scale, built.found_inf = None, torch.tensor(skipped)  # what GradScaler sets
        built.step()
    assert torch.allclose(p, torch.full_like(p, 1.0 - 0.01 * (0.5 + 0.02)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_one_group_in_model_order(name: str) -> None:
    model = tiny()
    groups = build_optimizer(model, section(name), CPU).param_groups
    assert len(groups) == 1
    assert groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(groups[0]["params"], model.parameters(), strict=True))
    assert groups[0]["weight_decay"] == 0.02


@pytest.mark.parametrize("name", NAMES)
def test_norms_biases_and_positions_without_decay(name: str) -> None:
    model = tiny()
    groups = build_optimizer(model, section(name, decay_norms_and_biases=False), CPU).param_groups
    everything = [n for n, _ in model.named_parameters()]
    assert groups[0]["param_names"] == TINY_DECAYED
    assert groups[1]["param_names"] == [n for n in everything if n not in TINY_DECAYED]
    assert [group["weight_decay"] for group in groups] == [0.02, 0.0]
    by_name = dict(model.named_parameters())
    assert all(by_name[n] is p for g in groups for n, p in zip(g["param_names"], g["params"], strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "densenet121",
        "mobilenet_v3_small",
        "convnext_tiny",
        "swin_t",
        "vit_b_16",
        "maxvit_t",
        "inception_v3",
    ],
)
def test_torchvision_models_decay_their_layers_weights(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, **({"init_weights": False} if name == "inception_v3" else {}))
    layers = (nn.Conv2d, nn.Linear)
    expected = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, layers)}
    expected |= {f"{n}.in_proj_weight" for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    assert decayed_names(model) == expected


@pytest.mark.parametrize(
    "name", ["resnetv2_50", "convnext_atto", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "levit_128s",
             "coat_tiny", "mvitv2_tiny", "xcit_nano_12_p16_224", "evonorm", "nf_resnet50", "fastvit_t8", "volo_d1_224"]
)  # fmt: skip
def test_timm_models_decay_their_layers_weights(name: str) -> None:
    short = "resnetv2_50d_evos" if name == "evonorm" else name
    try:
        with torch.device("meta"):
            model = timm.create_model(short)
    except RuntimeError:  # constructors of older timm read numbers off tensors
        model = timm.create_model(short)
    expected = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))}
    assert decayed_names(model) == expected


class Plane(nn.LayerNorm):
    """A norm that is not called one."""


class RmsNormPlane(nn.Module):
    """A norm that is not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 4))


class NormLinear(nn.Linear):
    """A layer that is called a norm."""


def test_norms_are_known_by_kind_not_by_dimensions() -> None:
    assert decayed_names(nn.Sequential(Plane((4, 4)), RmsNormPlane(), NormLinear(4, 4))) == {"2.weight"}


def test_the_models_own_list_is_respected() -> None:
    model = tiny()
    model.no_weight_decay = lambda: {"head.weight"}  # type: ignore[assignment]
    assert decayed_names(model) == set(TINY_DECAYED) - {"head.weight"}


def test_tied_weights_appear_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert decayed_names(model) == {"0.weight"}
    groups = build_optimizer(model, section("sgd", decay_norms_and_biases=False), CPU).param_groups
    assert [group["param_names"] for group in groups] == [["0.weight"], ["0.bias", "1.bias"]]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_state_resumes_bit_for_bit(name: str, channels_last: bool) -> None:
    part = section(name, decay_norms_and_biases=False)
    model = tiny(channels_last)
    built = build_optimizer(model, part, CPU)
    train(model, built, range(3))
    saved = safetensors.torch.load(safetensors.torch.save(optimizer_state(model, built)))

    resumed = copy.deepcopy(model)
    again = build_optimizer(resumed, part, CPU)
    train(resumed, again, range(50, 52))  # state and weights of somewhere else, to be replaced
    resumed.load_state_dict(model.state_dict())
    load_optimizer_state(resumed, again, saved)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert built.state[p].keys() == again.state[q].keys()
        for key, value in built.state[p].items():
            twin = again.state[q][key]
            assert torch.equal(value, twin)
            assert (value.dtype, memory_order(value)) == (twin.dtype, memory_order(twin))
    train(model, built, range(3, 6))
    train(resumed, again, range(3, 6))
    for (n, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), n


@pytest.mark.parametrize("name", NAMES)
def test_saved_state_is_flat_contiguous_and_apart(name: str) -> None:
    model = tiny(channels_last=True)
    built = build_optimizer(model, section(name), CPU)
    assert optimizer_state(model, built) == {}
    train(model, built, range(1))
    state = optimizer_state(model, built)
    keys = ["momentum_buffer"] if name == "sgd" else ["step", "exp_avg", "exp_avg_sq"]
    assert list(state) == [f"{n}.{key}" for n, _ in model.named_parameters() for key in keys]
    assert all(t.is_contiguous() for t in state.values())
    assert all(t.dim() == 0 for n, t in state.items() if n.endswith(".step"))
    before = {n: t.clone() for n, t in state.items()}
    train(model, built, range(1, 3))
    assert all(torch.equal(t, before[n]) for n, t in state.items())


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_state_is_a_fresh_start(name: str) -> None:
    model = tiny()
    used = build_optimizer(model, section(name), CPU)
    train(model, used, range(3))
    twin = copy.deepcopy(model)
    load_optimizer_state(model, used, {})
    train(model, used, range(3, 6))
    train(twin, build_optimizer(twin, section(name), CPU), range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_names_are_the_bare_models() -> None:
    model = tiny()
    wrapped = torch.compile(model, backend="eager")
    built = build_optimizer(wrapped, section("sgd"), CPU)  # type: ignore[arg-type]
    train(model, built, range(1))
    assert built.param_groups[0]["param_names"][-1] == "head.bias"
    state = optimizer_state(wrapped, built)  # type: ignore[arg-type]
    assert "head.bias.momentum_buffer" in state
    load_optimizer_state(wrapped, built, state)  # type: ignore[arg-type]


def test_state_of_another_model_or_optimizer_is_refused() -> None:
    model = tiny()
    built = build_optimizer(model, section("sgd"), CPU)
    with pytest.raises(UserError, match=r"'haed.weight'.*did you mean 'head.weight'"):
        load_optimizer_state(model, built, {"haed.weight.momentum_buffer": torch.zeros(4, 8)})
    with pytest.raises(UserError, match=r"head.weight.momentum_buffer has shape \(8, 4\)"):
        load_optimizer_state(model, built, {"head.weight.momentum_buffer": torch.zeros(8, 4)})
    with pytest.raises(UserError, match=r"optimizer\.name"):
        load_optimizer_state(model, built, {"head.weight.exp_avg": torch.zeros(4, 8)})
    with pytest.raises(ValueError, match="not the model's"):
        optimizer_state(nn.Linear(2, 2), built)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        (section("adamw", nesterov=True), "optimizer.nesterov"),
        (section("adam", betas=(0.9,)), "optimizer.betas"),
        (section("sgd", nesterov=True, momentum=0.0), "optimizer.nesterov"),
    ],
)
def test_contradictions_are_refused(part: params.Optimizer, key: str) -> None:
    with pytest.raises(ParamError, match=key):
        build_optimizer(tiny(), part, CPU)


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        build_optimizer(tiny(), section("adamww"), CPU)


def test_depthwise_convolutions_can_be_spared() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=4), nn.Linear(8, 2))
    both = params.Optimizer(decay_norms_and_biases=False, decay_depthwise=False, weight_decay=0.1)
    groups = build_optimizer(net, both, torch.device("cpu")).param_groups
    assert [(group["param_names"], group["weight_decay"]) for group in groups] == [
        (["0.weight", "2.weight", "3.weight"], 0.1),
        (["0.bias", "1.weight", "1.bias", "2.bias", "3.bias"], 0.0),
    ]
    alone = params.Optimizer(decay_depthwise=False, weight_decay=0.1)
    groups = build_optimizer(net, alone, torch.device("cpu")).param_groups
    assert groups[1]["param_names"] == ["1.weight"]
