"""Classification losses and metrics against numpy."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utils.system.errors import UserError
from utils.tasks import Task
from utils.tasks.classification import ImageClassification

CPU = torch.device("cpu")


class Fixed(nn.Module):
    """Returns the logits it was given, whatever the images."""

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Any:
        return self.logits


def make_batch(samples: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 4, 4, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    return images, labels, 3 * torch.randn(samples, classes, generator=generator)


def log_softmax(logits: Tensor) -> np.ndarray:
    x = logits.double().numpy()
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def onehot(labels: Tensor, classes: int) -> np.ndarray:
    return np.eye(classes)[labels.numpy()]


def within(logits: Tensor, labels: Tensor, k: int) -> int:
    """Samples whose label is among the first k of a stable sort by falling logit."""
    order = np.argsort(-logits.double().numpy(), axis=1, kind="stable")[:, :k]
    return int((order == labels.numpy()[:, None]).any(1).sum())


def test_it_is_a_task() -> None:
    task: Task = ImageClassification(10)
    members = [name for name in vars(Task) if not name.startswith("_")]
    assert members
    assert all(callable(getattr(task, name)) for name in members)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_training_loss_is_smoothed_cross_entropy(smoothing: float) -> None:
    images, labels, logits = make_batch(32, 10)
    loss, returned = ImageClassification(10, label_smoothing=smoothing).loss(Fixed(logits), (images, labels))
    target = (1 - smoothing) * onehot(labels, 10) + smoothing / 10
    assert loss.item() == pytest.approx(-(target * log_softmax(logits)).sum(1).mean(), rel=1e-6)
    assert torch.equal(returned, logits)


def test_scoring_and_evaluation_losses_are_plain() -> None:
    images, labels, logits = make_batch(32, 10)
    task = ImageClassification(10, label_smoothing=0.3, mixup=1.0, cutmix=1.0)
    expected = -(onehot(labels, 10) * log_softmax(logits)).sum(1).mean()
    assert task.scoring_loss(Fixed(logits), (images, labels)).item() == pytest.approx(expected, rel=1e-6)
    read = task.read(task.evaluate_batch(Fixed(logits), (images, labels)))
    assert read["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_never_in_half_precision(dtype: torch.dtype) -> None:
    images, labels, logits = make_batch(64, 10)
    logits = logits.to(dtype)
    expected = -(onehot(labels, 10) * log_softmax(logits)).sum(1).mean()
    for loss in (
        ImageClassification(10).loss(Fixed(logits), (images, labels))[0],
        ImageClassification(10).scoring_loss(Fixed(logits), (images, labels)),
    ):
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert loss.item() == pytest.approx(expected, rel=1e-6 if dtype != torch.float64 else 1e-12)


def use_mixing(monkeypatch: pytest.MonkeyPatch, mix: Callable[..., Any]) -> None:
    module = types.ModuleType("utils.data.mixing")
    module.mix = mix  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "utils.data.mixing", module)


def test_mixed_targets_reach_model_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, logits = make_batch(16, 4)
    seen: dict[str, Any] = {}

    def mix(*arguments: Any) -> tuple[Tensor, Tensor]:
        seen["arguments"] = arguments[2:]
        soft = 0.7 * onehot(arguments[1], 4) + 0.3 * onehot(arguments[1].flip(0), 4)
        return arguments[0] * 2, torch.tensor(soft, dtype=torch.float32)

    class Recorder(Fixed):
        def forward(self, images: Tensor) -> Any:
            seen["images"] = images
            return super().forward(images)

    use_mixing(monkeypatch, mix)
    task = ImageClassification(4, label_smoothing=0.2, mixup=0.4, cutmix=1.0)
    loss, returned = task.loss(Recorder(logits), (images, labels), key=12345)
    assert seen["arguments"] == (4, 0.4, 1.0, 12345)
    assert torch.equal(seen["images"], images * 2)
    soft = 0.8 * (0.7 * onehot(labels, 4) + 0.3 * onehot(labels.flip(0), 4)) + 0.2 / 4
    assert loss.item() == pytest.approx(-(soft * log_softmax(logits)).sum(1).mean(), rel=1e-6)
    totals = task.totals(CPU)
    task.accumulate(totals, loss, returned, labels)
    assert totals[1] == within(logits, labels, 1)
    with pytest.raises(ValueError, match="key"):
        task.loss(Fixed(logits), (images, labels))


def test_nothing_is_mixed_without_alphas(monkeypatch: pytest.MonkeyPatch) -> None:
    def mix(*arguments: Any) -> None:
        raise AssertionError("mixed")

    use_mixing(monkeypatch, mix)
    images, labels, logits = make_batch(16, 4)
    loss, _ = ImageClassification(4).loss(Fixed(logits), (images, labels), key=1)
    assert loss.item() == pytest.approx(-(onehot(labels, 4) * log_softmax(logits)).sum(1).mean(), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 4, 5, 6, 100])
@pytest.mark.parametrize("coarse", [False, True])
def test_accuracies_are_a_stable_sorts(classes: int, coarse: bool) -> None:
    images, labels, logits = make_batch(300, classes)
    logits = logits.round() if coarse else logits  # whole numbers tie often
    task = ImageClassification(classes)
    totals = task.evaluate_batch(Fixed(logits), (images, labels))
    top1, top5 = within(logits, labels, 1), within(logits, labels, min(5, classes))
    assert totals.tolist()[1:] == [top1, top5, 300]
    read = task.read(totals)
    assert read["acc"] == pytest.approx(100 * top1 / 300)
    assert read["acc5"] == pytest.approx(100 * top5 / 300)
    if classes <= 5:
        assert read["acc5"] == 100.0


def test_a_constant_network_is_right_by_chance_alone() -> None:
    labels = torch.arange(20).repeat(3)
    task = ImageClassification(20)
    read = task.read(task.evaluate_batch(Fixed(torch.zeros(60, 20)), (torch.zeros(60, 3, 4, 4), labels)))
    assert read["acc"] == 5.0
    assert read["acc5"] == 25.0


@pytest.mark.parametrize("where", ["everywhere", "label", "other"])
def test_nan_is_never_correct(where: str) -> None:
    labels = torch.tensor([3, 1])
    logits = torch.zeros(2, 6)
    logits[[0, 1], labels] = 9.0
    if where == "other":
        logits[:, 5] = float("nan")
    elif where == "label":
        logits[[0, 1], labels] = float("nan")
    else:
        logits[:] = float("nan")
    totals = ImageClassification(6).evaluate_batch(Fixed(logits), (torch.zeros(2, 3, 4, 4), labels))
    assert totals[1] == 0
    assert totals[2] == (2 if where == "other" else 0)
    assert torch.isnan(totals[0])


def test_batches_and_shards_add_up() -> None:
    images, labels, logits = make_batch(101, 7)
    task = ImageClassification(7)
    whole = task.evaluate_batch(Fixed(logits), (images, labels))
    parts, trained = task.totals(CPU), task.totals(CPU)
    assert parts.dtype == torch.float64
    for piece in (slice(0, 40), slice(40, 40), slice(40, 99), slice(99, 101)):
        batch = (images[piece], labels[piece])
        parts += task.evaluate_batch(Fixed(logits[piece]), batch)
        if len(batch[1]):
            task.accumulate(trained, *task.loss(Fixed(logits[piece]), batch), batch[1])
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(trained, whole, rtol=1e-6, atol=0)


def test_accumulation_leaves_no_graph() -> None:
    images, labels, logits = make_batch(8, 3)
    task, logits = ImageClassification(3), logits.requires_grad_()
    totals = task.totals(CPU)
    loss, outputs = task.loss(Fixed(logits), (images, labels))
    task.accumulate(totals, loss, outputs, labels)
    assert not totals.requires_grad
    loss.backward()
    probability = np.exp(log_softmax(logits.detach()))
    np.testing.assert_allclose(logits.grad.numpy(), (probability - onehot(labels, 3)) / 8, atol=1e-7)


def test_test_time_flip_averages_logits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    images, labels, _ = make_batch(64, 5)
    both = ImageClassification(5, test_flip=True).evaluate_batch(model, (images, labels))
    with torch.no_grad():
        mirrored = torch.tensor(images.numpy()[:, :, :, ::-1].copy())
        mean = (model(images) + model(mirrored)) / 2
    assert both[0].item() == pytest.approx(-(onehot(labels, 5) * log_softmax(mean)).sum(), rel=1e-5)
    assert both[1].item() == within(mean, labels, 1)


def test_nothing_waits_for_the_device() -> None:
    """Tensors on `meta` hold no numbers: whatever reads one raises."""
    meta = torch.device("meta")
    task = ImageClassification(10, label_smoothing=0.1, test_flip=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10, device=meta))
    batch = (torch.zeros(8, 3, 4, 4, device=meta), torch.zeros(8, dtype=torch.int64, device=meta))
    totals = task.totals(meta)
    loss, outputs = task.loss(model, batch)
    task.accumulate(totals, loss, outputs, batch[1])
    totals += task.evaluate_batch(model, batch)
    task.scoring_loss(model, batch)
    with pytest.raises(RuntimeError, match="meta tensor"):
        task.read(totals)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(2, 4)), "auxiliary heads off"),
        (torch.zeros(2, 5), "4 classes"),
        (torch.zeros(2, 4, 1, 1), "4 classes"),
    ],
)
def test_models_without_plain_logits_are_refused(logits: Any, message: str) -> None:
    task, batch = ImageClassification(4), (torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
    for use in (task.loss, task.scoring_loss, task.evaluate_batch):
        with pytest.raises(UserError, match=message):
            use(Fixed(logits), batch)


def test_reading_nothing_is_an_error() -> None:
    task = ImageClassification(4)
    with pytest.raises(ValueError, match="no samples"):
        task.read(task.totals(CPU))
