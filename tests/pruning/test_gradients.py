"""Shared parts of gradient criteria: closed forms, and what is left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utils import sparsity
from utils.masks import Masks
from utils.pruning.criteria import _gradients as shared

Batch = tuple[Tensor, Tensor]
ROWS = np.random.default_rng(0).normal(size=(11, 4))
TARGETS = np.random.default_rng(1).normal(size=(11, 3))


def squares(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the batch of 1/2 |model(x) - y|^2."""
    return (model(batch[0]) - batch[1]).square().sum(1).mean() / 2


def split(*sizes: int) -> list[Batch]:
    """The rows and targets in micro-batches of these sizes."""
    assert sum(sizes) == len(ROWS)
    pairs = zip(torch.tensor(ROWS).split(sizes), torch.tensor(TARGETS).split(sizes), strict=True)
    return list(pairs)


def linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(4, 3, bias=False).double()


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def drawn(model: nn.Module, density: float = 0.5) -> Masks:
    generator = torch.Generator().manual_seed(5)
    return Masks({n: torch.rand(m.shape, generator=generator) < density for n, m in Masks.dense(model).items()})


# Inside the masks


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pruned_weights_are_zero_inside_and_bitwise_back(layout: torch.memory_format, dtype: torch.dtype) -> None:
    conv = nn.Conv2d(3, 5, 3)
    model = nn.Sequential(conv, nn.Conv2d(5, 2, 3)).to(dtype).to(memory_format=layout)
    weight = conv.weight
    masks = Masks({"0.weight": drawn(model)["0.weight"].index_fill(0, torch.tensor([0, 1]), False)})
    with torch.no_grad():
        weight[0].fill_(-0.0)
        weight[1].fill_(float("nan"))
    before, strides, other = bits(weight), weight.stride(), weight.detach().clone()
    with shared.inside(model, masks):
        assert set(bits(weight[~masks["0.weight"]])) == {0}
        assert torch.equal(weight[masks["0.weight"]], other[masks["0.weight"]])
    assert bits(weight) == before
    assert weight.stride() == strides


def test_weights_are_back_after_an_error() -> None:
    model = linear()
    before = bits(model.weight)

    def fail() -> None:
        assert bits(model.weight) != before
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), shared.inside(model, drawn(model)):
        fail()
    assert bits(model.weight) == before


@pytest.mark.parametrize("inplace", [False, True])
def test_hard_sigmoid_is_twice_differentiable_inside(inplace: bool) -> None:
    def hard_sigmoid(x: Tensor) -> Tensor:
        return nn.Hardsigmoid(inplace)(x * 1.0)

    x = torch.tensor([-5.0, -3.0, -1.5, 0.0, 2.5, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    with shared.math_attention():
        value = hard_sigmoid(x)
        (grad,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(value, hard_sigmoid(x))
    torch.testing.assert_close(grad, torch.autograd.grad(hard_sigmoid(x).square().sum(), x)[0])
    # Second derivative of (x/6 + 1/2)^2 between the kinks: 2/36.
    slope = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(second, slope / 18)


def test_only_the_named_parameters_require_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    with shared.only(model, ["0.weight", "1.bias"]):
        assert [p.requires_grad for p in model.parameters()] == [True, False, False, True]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, False]


def test_attention_is_plain_only_inside() -> None:
    def flags() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        flash, memory = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
        return (flash, memory, cuda.math_sdp_enabled(), torch.backends.mha.get_fastpath_enabled())

    before = flags()
    with shared.math_attention():
        assert flags() == (False, False, True, False)
    assert flags() == before


# First order


def by_hand(weight: Tensor) -> np.ndarray[Any, Any]:
    """(W X^T - Y^T) X / n."""
    found: np.ndarray[Any, Any] = (weight.detach().numpy() @ ROWS.T - TARGETS.T) @ ROWS / len(ROWS)
    return found


@pytest.mark.parametrize("sizes", [(11,), (5, 6), (1, 9, 1), (1,) * 11])
def test_mean_gradient_is_that_of_all_samples(sizes: tuple[int, ...]) -> None:
    model = linear()
    found = shared.mean_gradients(model, Masks.dense(model), split(*sizes), squares)
    np.testing.assert_allclose(found["weight"].numpy(), by_hand(model.weight), rtol=1e-13, atol=1e-14)


def test_gradients_of_pruned_places_show_through_hooks_that_mask_them() -> None:
    model = linear()
    held = sparsity.attach(model, None, drawn(model))
    found = shared.mean_gradients(model, held.masks, split(11), squares)
    np.testing.assert_allclose(found["weight"].numpy(), by_hand(model.weight), rtol=1e-13, atol=1e-14)
    held.detach()


def test_sums_are_rounded_once() -> None:
    # In float32 1 + 1e-8 is 1: hundred such steps are lost unless they are summed in float64.
    model = nn.Linear(1, 1, bias=False)
    steps = [1.0] + [1e-8] * 100 + [-1.0]
    batches = [(torch.tensor([[value]]), torch.zeros(1)) for value in steps]
    found = shared.mean_gradients(model, Masks.dense(model), batches, lambda net, batch: net(batch[0]).mean())
    assert found["weight"].dtype == torch.float32
    assert float(found["weight"]) == pytest.approx(1e-6 / len(steps), rel=1e-6)


def test_bfloat16_weights_get_float32_gradients() -> None:
    model = linear().bfloat16()
    batches = [(torch.ones(2, 4, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16))]
    assert shared.mean_gradients(model, Masks.dense(model), batches, squares)["weight"].dtype == torch.float32


class Tied(nn.Module):
    """x -> V^T V x with one weight under two names, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(4, 4, bias=False).double() for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0]).sum(1).mean()


def test_tied_weights_get_the_sum_of_both_uses_and_unused_ones_zero() -> None:
    model = Tied()
    masks = Masks.dense(model)
    assert list(masks) == ["first.weight", "unused.weight"]
    found = shared.mean_gradients(model, masks, split(4, 7), outputs)
    v, x, ones = model.first.weight.detach().numpy(), ROWS.mean(0), np.ones(4)
    np.testing.assert_allclose(found["first.weight"].numpy(), np.outer(ones, v @ x) + np.outer(v.T @ ones, x))
    assert not found["unused.weight"].any()


def test_a_loss_that_no_weight_moves_gives_zero() -> None:
    model = Tied()
    masks = Masks({"unused.weight": torch.ones(4, 4, dtype=torch.bool)})
    assert not shared.mean_gradients(model, masks, split(11), outputs)["unused.weight"].any()
    vectors = {"unused.weight": torch.ones(4, 4).double()}
    assert not shared.hessian_products(model, masks, split(11), outputs, vectors)["unused.weight"].any()


def test_gradients_that_were_there_and_hooks_are_left_alone() -> None:
    model = linear()
    squares(model, split(11)[0]).backward()
    grad, before = model.weight.grad, bits(model.weight.grad)  # type: ignore[arg-type]
    shared.mean_gradients(model, Masks.dense(model), split(11), squares)
    shared.hessian_products(model, Masks.dense(model), split(11), squares, {"weight": model.weight.detach()})
    assert model.weight.grad is grad
    assert bits(grad) == before  # type: ignore[arg-type]
    assert not model.weight._backward_hooks
    assert not model.weight._post_accumulate_grad_hooks


def test_no_batches_at_all_is_an_error() -> None:
    model = linear()
    with pytest.raises(ValueError, match="no scoring batches"):
        shared.mean_gradients(model, Masks.dense(model), [], squares)


# Ranks: the collective is replaced by one that adds what the other rank sent


class Ranks:
    """Records what is reduced; adds what was recorded on the other rank."""

    def __init__(self, other: Ranks | None = None) -> None:
        self.sent: list[Tensor] = []
        self.other = other

    def __call__(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor.clone())
        if self.other is not None:
            tensor += self.other.sent[len(self.sent) - 1]
        return tensor


def test_shares_of_two_ranks_add_up_even_when_one_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear()
    batches = split(4, 7)
    for first, second in ((batches[:1], batches[1:]), (batches, [])):
        one = Ranks()
        monkeypatch.setattr(shared, "sum_over_ranks", one)
        shared.mean_gradients(model, Masks.dense(model), first, squares)
        two = Ranks(one)
        monkeypatch.setattr(shared, "sum_over_ranks", two)
        found = shared.mean_gradients(model, Masks.dense(model), second, squares)
        assert [(t.shape, t.dtype) for t in one.sent] == [(t.shape, t.dtype) for t in two.sent]
        assert all(t.dtype == torch.float64 and t.is_contiguous() for t in two.sent)
        np.testing.assert_allclose(found["weight"].numpy(), by_hand(model.weight), rtol=1e-13, atol=1e-14)


def test_sums_of_channels_last_weights_are_reduced_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to(memory_format=torch.channels_last)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    plain.load_state_dict(model.state_dict())
    record = Ranks()
    monkeypatch.setattr(shared, "sum_over_ranks", record)
    batches = [(torch.randn(2, 3, 5, 5), torch.zeros(1))]
    found = [shared.mean_gradients(net, Masks.dense(net), batches, outputs)["0.weight"] for net in (model, plain)]
    assert all(t.is_contiguous() for t in record.sent)
    torch.testing.assert_close(found[0], found[1])


# Second order


@pytest.mark.parametrize("sizes", [(11,), (2, 9)])
def test_hessian_product_of_a_quadratic(sizes: tuple[int, ...]) -> None:
    # H of 1/2 mean |W x - y|^2 maps V to V X^T X / n, wherever W is.
    model = linear()
    vector = np.random.default_rng(2).normal(size=(3, 4))
    vectors = {"weight": torch.tensor(vector)}
    found = shared.hessian_products(model, Masks.dense(model), split(*sizes), squares, vectors)
    np.testing.assert_allclose(found["weight"].numpy(), vector @ ROWS.T @ ROWS / len(ROWS), rtol=1e-13)


def test_hessian_product_of_tied_weights() -> None:
    # 1/n sum of 1^T V V x is bilinear in the two uses of V: the product with U is its derivative with U in either.
    model = Tied()
    u, x, ones = np.random.default_rng(2).normal(size=(4, 4)), ROWS.mean(0), np.ones(4)
    vectors = {"first.weight": torch.tensor(u), "unused.weight": torch.ones(4, 4).double()}
    found = shared.hessian_products(model, Masks.dense(model), split(4, 7), outputs, vectors)
    np.testing.assert_allclose(found["first.weight"].numpy(), np.outer(ones, u @ x) + np.outer(u.T @ ones, x))
    assert not found["unused.weight"].any()
