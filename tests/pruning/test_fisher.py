"""Fisher against the gradients of single samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.masks import Masks
from utils.pruning.criteria import criterion
from utils.pruning.preserve import preserved

Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(4)
    norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), norm, nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def data() -> Batch:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(7, 2, 6, 6, generator=generator, dtype=torch.float64), torch.arange(7) % 3


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def fisher(model: nn.Module, masks: Masks, batches: list[Batch]) -> dict[str, Tensor]:
    entry = criterion.entry("fisher")
    with preserved(model, entry.traits["batchnorm"]):
        return entry.value(model, masks, batches, cross_entropy, generator=torch.Generator())


def half(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(5)
    return Masks({n: torch.rand(m.shape, generator=generator) < 0.6 for n, m in Masks.dense(model).items()})


def test_mean_of_squared_gradients_of_single_samples() -> None:
    model, masks = net().train(), half(net())
    images, labels = data()
    found = fisher(model, masks, [(images[:4], labels[:4]), (images[4:], labels[4:])])

    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    held = {name: p * masks[name] if name in masks else p for name, p in theta.items()}
    buffers = dict(model.eval().named_buffers())

    def single(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {**weights, **buffers}, (image[None],))
        return -functional.log_softmax(logits, 1)[0].gather(0, label[None])[0]

    grads = torch.func.vmap(torch.func.grad(single), in_dims=(None, 0, 0))(held, images, labels)
    for name, score in found.items():
        expected = theta[name] ** 2 * (grads[name] ** 2).mean(0) / 2
        torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-15)
        assert float(score[~masks[name]].max()) > 0.0


def test_logistic_regression_by_hand() -> None:
    # Gradient of sample (x, y) in row k: (softmax_k - [k = y]) x. With zero logits softmax is 1/2.
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 0.0], [2.0, -4.0]]))
    # Both inputs give equal logits: the first feature acts alike on both classes, the second is 0.
    images = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    found = fisher(model, Masks.dense(model), [(images, torch.tensor([0, 1]))])["weight"]
    # 1/2 * 2^2 * mean(1/4, 9/4) = 2.5; the mean gradient is -1/2 (1/2 - 3/2) = 1/2, its square would give 1/2.
    torch.testing.assert_close(found, torch.tensor([[2.5, 0.0], [2.5, 0.0]], dtype=torch.float64))


def test_the_split_into_batches_does_not_matter() -> None:
    model = net().float()
    images, labels = data()[0].float(), data()[1]
    masks = half(model)
    whole = fisher(model, masks, [(images, labels)])
    parts = fisher(model, masks, [(images[:1], labels[:1]), (images[1:6], labels[1:6]), (images[6:], labels[6:])])
    assert all(torch.equal(score, parts[name]) for name, score in whole.items())
    assert all(score.dtype == torch.float32 for score in whole.values())


def test_small_gradients_are_squared_in_float64() -> None:
    # In float32 the square of a gradient of 1e-22 has no digits left; its product with a squared weight of 1e40 has.
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1e20)
    entry = criterion.entry("fisher")
    batches = [(torch.full((2, 1), 1e-22), torch.zeros(2))]
    found = entry.value(
        model, Masks.dense(model), batches, lambda net, batch: net(batch[0]).mean(), generator=torch.Generator()
    )
    assert float(found["weight"]) == pytest.approx(0.5e-4, rel=1e-6)
