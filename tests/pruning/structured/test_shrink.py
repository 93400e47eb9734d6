"""Shrinking: the smaller model computes what the masked one does, in evaluation and in training, state included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.pruning.structured_cases import SHAPE, batch, channels, cross_entropy, half, small
from utils import sparsity
from utils.masks import Masks
from utils.pruning.structured import Channels, shrink, shrink_masks, shrink_optimizer
from utils.pruning.structured.mask import ChannelMask
from utils.pruning.structured.shrink import enlarge_masks, selected


def held(model: nn.Module, found: Channels, mask: ChannelMask) -> nn.Module:
    """A copy with everything of dead units at 0.0, written out apart from the code under test."""
    copied = copy.deepcopy(model)
    tensors = dict(copied.named_parameters())
    with torch.no_grad():
        for group in found.groups:
            dead = (~mask[group.name]).nonzero().flatten().tolist()
            for part in group.parts:
                rows = [at for at, unit in enumerate(part.units.tolist()) if unit in dead]
                for name, dim in part.tensors:
                    if name in tensors:
                        tensors[name].movedim(dim, 0)[rows] = 0.0
    return copied


NETWORKS = [
    ("cifar/resnet20", 32),
    ("torchvision/densenet121", 64),
    ("timm/efficientnet_b0", 64),
    ("timm/vit_tiny_patch16_224", 32),
]


@pytest.mark.parametrize(("name", "side"), NETWORKS)
def test_outputs_and_gradients_are_those_of_the_masked_model(name: str, side: int) -> None:
    model, found = channels(name, side)
    model = no_chance(copy.deepcopy(model).double())
    mask, images = half(found), batch((3, side, side), 10)
    images = (images[0].double(), images[1])
    whole, smaller = held(model, found, mask), shrink(model, found.groups, mask)
    with torch.no_grad():
        expected = whole.eval()(images[0])
        assert apart(smaller.eval()(images[0]), expected) < 1e-9
        assert apart(model.eval()(images[0]), expected) > 1e-2
    for net in (whole.train(), smaller.train()):
        cross_entropy(net, images).backward()
    keep, expected_grads = mask.keep(found.groups), dict(whole.named_parameters())
    for key, p in smaller.named_parameters():
        expected_grad = expected_grads[key].grad
        assert (p.grad is None) == (expected_grad is None)
        if p.grad is not None:
            wanted = selected(expected_grad, keep.get(key, {}))
            assert apart(p.grad, wanted) < 1e-6, key


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    size = float(expected.abs().max())
    return float((found - expected).abs().max()) / size if size > 1e-12 else float(found.abs().max())


def no_chance(model: nn.Module) -> nn.Module:
    """Without dropout, whose draws depend on the shape."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0
    return model


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_training_goes_on_as_if_nothing_had_been_taken_out(optimizer: str) -> None:
    """Two steps, shrink with the optimizer's state, two more: the live weights of the masked model, step for step."""
    model = small().double()
    found = Channels.of(model, SHAPE)
    mask = half(found)
    own = OPTIMIZERS[optimizer](model.parameters())
    images, labels = batch(SHAPE, 3)
    steps = [(images.double(), labels), (images.double().flip(0), labels)]
    train(model, own, steps)
    smaller = shrink(model, found.groups, mask)
    other = copy.deepcopy(own)  # its parameters are copies; give them the model's
    for group, mine in zip(other.param_groups, own.param_groups, strict=True):
        group["params"] = mine["params"]
    other.state.clear()
    other.state.update({p: {k: copy.deepcopy(v) for k, v in s.items()} for p, s in own.state.items()})
    shrink_optimizer(other, model, smaller, mask.keep(found.groups))
    # The oracle: everything of dead units filled with 0.0 after every step, state included.
    dead = mask.parameters(model, found.groups)

    def project() -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in dead:
                    p[~dead[name]] = 0.0
                    for value in own.state[p].values():
                        if isinstance(value, torch.Tensor) and value.shape == p.shape:
                            value[~dead[name]] = 0.0

    project()
    for step in steps:
        for p in model.parameters():
            p.grad = None
        cross_entropy(model.train(), step).backward()
        for name, p in model.named_parameters():
            if name in dead:
                p.grad[~dead[name]] = 0.0
        own.step()
        project()
    train(smaller, other, steps)
    keep = mask.keep(found.groups)
    for name, p in smaller.named_parameters():
        expected = selected(dict(model.named_parameters())[name], keep.get(name, {}))
        assert torch.allclose(p, expected, atol=1e-10), name
    for name, b in smaller.named_buffers():
        expected = selected(dict(model.named_buffers())[name], keep.get(name, {}))
        assert torch.allclose(b.double(), expected.double(), atol=1e-10), name


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps) -> None:
    for step in steps:
        optimizer.zero_grad()
        cross_entropy(model.train(), step).backward()
        optimizer.step()


def test_unstructured_masks_carry_over() -> None:
    """Structured first, then unstructured: the weights that both leave."""
    model = small()
    found = Channels.of(model, SHAPE)
    mask, generator = half(found), torch.Generator().manual_seed(1)
    weights = Masks({n: torch.rand(m.shape, generator=generator) < 0.5 for n, m in Masks.dense(model).items()})
    both = mask.masks(model, found.groups, within=weights)
    smaller = shrink(model, found.groups, mask)
    carried = shrink_masks(weights, mask.keep(found.groups)).check(smaller)
    assert carried.kept == both.kept < min(weights.kept, mask.masks(model, found.groups).kept)
    assert enlarge_masks(carried, mask.keep(found.groups), Masks.dense(model)) == both
    sparsity.attach(smaller, None, carried)
    both.apply_(model)
    mask.apply_(model, found.groups)
    images = batch(SHAPE, 3)[0]
    assert torch.allclose(smaller.eval()(images), model.eval()(images), atol=1e-6)


def test_a_mask_counts_weights_alone_and_holds_shifts_too() -> None:
    model = small()
    found = Channels.of(model, SHAPE)
    mask = half(found)
    weights, others = mask.masks(model, found.groups), mask.others(model, found.groups)
    assert set(others) == {"a.bias", "bn.weight", "bn.bias", "dw.bias", "c.bias", "fc1.bias"}
    live_a, live_b, live_f = (mask.widths[name] for name in ("a", "b", "fc1"))
    assert weights.kept == 3 * 9 * live_a + 2 * live_a * live_b + 9 * live_b + 4 * live_b * live_f + 3 * live_f
    assert weights.kept == sum(
        p.numel() for n, p in shrink(model, found.groups, mask).named_parameters() if p.dim() > 1
    )


def test_channels_last_stays_channels_last() -> None:
    model = small().to(memory_format=torch.channels_last)
    found = Channels.of(model, SHAPE)
    smaller = shrink(model, found.groups, half(found))
    assert smaller.a.weight.is_contiguous(memory_format=torch.channels_last)
    assert not smaller.a.weight.is_contiguous()


def test_a_group_never_loses_all_its_channels() -> None:
    with pytest.raises(ValueError, match="would lose all"):
        ChannelMask({"a": torch.zeros(3, dtype=torch.bool)})
