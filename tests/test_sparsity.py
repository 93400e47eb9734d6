"""Enforcement: pruned weights and state are exactly +0.0, live ones follow the `weight * mask` forward bit for bit."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from utils.masks import Masks, prunable_parameters
from utils.sparsity import attach

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-1, fused=True),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )


def random_masks(model: nn.Module, density: float = 0.3, seed: int = 1) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return Masks({n: torch.rand(p.shape, generator=generator) < density for n, p in prunable_parameters(model).items()})


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(6, 3, 6, 6, generator=generator), torch.randint(5, (6,), generator=generator))
        for _ in range(count)
    ]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 25, clip: float | None = None, micro: int = 1
) -> list[float]:
    losses = []
    for number, (images, labels) in enumerate(batches(count)):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        losses.append(loss.item())
        if (number + 1) % micro == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def assert_inside(model: nn.Module, optimizer: torch.optim.Optimizer, masks: Masks) -> None:
    """Independent of the code under test: look at every pruned place by hand."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        p = parameters[name]
        tensors = [p.detach(), *(v for v in optimizer.state[p].values() if torch.is_tensor(v) and v.shape == p.shape)]
        for tensor in tensors:
            pruned = tensor[~mask]
            assert pruned.eq(0).all(), name
            assert not torch.signbit(pruned).any(), name


class Masked(nn.Module):
    """The reference: every forward multiplies the weight by its mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.float())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trajectory_is_that_of_a_masked_forward_bit_for_bit(name: str, clip: float | None) -> None:
    model, masks = network(), random_masks(network())
    reference = copy.deepcopy(model)
    for key, mask in masks.items():
        module = reference.get_submodule(key.rpartition(".")[0])
        parametrize.register_parametrization(module, "weight", Masked(mask))
    optimizer = OPTIMIZERS[name](model.parameters())
    attach(model, optimizer, masks)
    losses = train(model, optimizer, clip=clip)
    expected = train(reference, OPTIMIZERS[name](reference.parameters()), clip=clip)
    if clip is None:
        assert losses == expected
    else:  # the norm is summed over tensors in another order of parameters
        assert losses == pytest.approx(expected, rel=1e-6)
    assert_inside(model, optimizer, masks)
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruning_in_mid_training_leaves_nothing_behind(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    held = attach(model, optimizer, Masks.dense(model))
    train(model, optimizer, 5)
    first = random_masks(model, 0.6)
    held.set(first)
    assert_inside(model, optimizer, first)
    train(model, optimizer, 5, micro=2)
    second = first & random_masks(model, 0.5, seed=9)
    address = model[0].weight.data_ptr()
    held.set(second)
    assert_inside(model, optimizer, second)
    train(model, optimizer, 5)
    assert_inside(model, optimizer, second)
    assert held.violations() == []
    assert model[0].weight.data_ptr() == address
    assert (model[6].weight.detach() != 0).sum() == second["6.weight"].sum()


def test_infinite_and_nan_gradients_at_pruned_places_do_no_harm() -> None:
    model = nn.Linear(4, 2, bias=False)
    masks = Masks({"weight": torch.tensor([[True, False, True, False]] * 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(model, optimizer, masks)
    images = torch.tensor([[1.0, float("inf"), 1.0, float("nan")]])
    model.weight.grad = None
    (model.weight * images).sum().backward()
    assert torch.isfinite(model.weight.grad).all()
    optimizer.step()
    assert_inside(model, optimizer, masks)


def test_channels_last_and_half_precision_parameters() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = network().to(dtype).to(memory_format=torch.channels_last)
        masks = random_masks(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        attach(model, optimizer, masks)
        for images, labels in batches(2):
            F.cross_entropy(model(images.to(dtype)), labels).backward()
            optimizer.step()
        assert_inside(model, optimizer, masks)
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_gradient_scaler_skips_and_steps_stay_inside() -> None:
    model = network()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    held = attach(model, optimizer, masks)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for images, labels in batches(4):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() < 2.0**40
    assert held.violations() == []


def test_dense_gradients_pass_only_while_asked_for() -> None:
    model = nn.Linear(4, 2, bias=False)
    masks = Masks({"weight": torch.zeros(2, 4, dtype=torch.bool)})
    held = attach(model, None, masks)
    held.dense_gradients(True)
    model(torch.ones(1, 4)).sum().backward()
    assert model.weight.grad.eq(1).all()
    model.weight.grad = None
    held.dense_gradients(False)
    model(torch.ones(1, 4)).sum().backward()
    assert model.weight.grad.eq(0).all()


def test_late_gradients_are_masked_all_at_once() -> None:
    model = network()
    model[6].bias.requires_grad_(False)
    model[3].to(torch.bfloat16)
    masks = random_masks(model)
    held = attach(model, None, masks)
    held.late_gradients(True)
    for p in model.parameters():
        if p.requires_grad:
            (p.float() * torch.full(p.shape, float("nan"))).sum().backward()
    model[0].weight.grad = None
    assert model[6].weight.grad.isnan().all()
    held.mask_gradients()
    for name in ("3.weight", "6.weight"):
        grad = dict(model.named_parameters())[name].grad
        assert grad[masks[name]].isnan().all()
        assert not torch.signbit(grad[~masks[name]]).any()
        assert grad[~masks[name]].eq(0).all()
    held.late_gradients(False)
    model[6](torch.ones(1, 288)).sum().backward()
    assert model[6].weight.grad[~masks["6.weight"]].eq(0).all()


def test_violations_are_seen() -> None:
    model = nn.Linear(4, 2, bias=False)
    held = attach(model, None, Masks({"weight": torch.tensor([[True, False] * 2] * 2)}))
    assert held.violations() == []
    model.weight.data[0, 1] = -0.0
    assert held.violations() == ["weight"]


def test_detach_lets_weights_go() -> None:
    model = nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    held = attach(model, optimizer, Masks({"weight": torch.zeros(2, 4, dtype=torch.bool)}))
    held.detach()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert model.weight.eq(-1).all()


def test_state_dict_keys_stay_stock_and_masks_of_another_model_are_refused() -> None:
    model = network()
    keys = list(model.state_dict())
    held = attach(model, None, random_masks(model))
    assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="other parameters"):
        held.set(Masks({"0.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool)}))


def test_compiled_model_stays_inside_without_recompiling_over_mask_changes() -> None:
    model = network()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    held = attach(model, optimizer, masks)
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    train(compiled, optimizer, 3)
    count = counter.frame_count
    held.set(masks & random_masks(model, seed=5))
    train(compiled, optimizer, 3)
    assert counter.frame_count == count >= 1
    assert_inside(model, optimizer, held.masks)


def test_a_model_is_freed_when_nothing_else_holds_it() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    held = attach(model, optimizer, random_masks(model))
    train(model, optimizer, 1)
    gone = weakref.ref(model[0].weight)
    gc.disable()  # no cycle to collect: memory goes at once
    try:
        del model, optimizer, held
        assert gone() is None
    finally:
        gc.enable()


def test_an_optimizer_that_moves_weights_without_gradients_is_held_too() -> None:
    class Restless(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(1.0)

    model = network()
    masks = random_masks(model)
    optimizer = Restless(model.parameters(), lr=0.1)
    attach(model, optimizer, masks)
    optimizer.step()
    assert_inside(model, optimizer, masks)
    assert model[6].weight.detach()[masks["6.weight"]].gt(0.5).any()
