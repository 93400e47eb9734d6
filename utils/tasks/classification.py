"""Image classification: cross-entropy, accuracy and top-5 accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.system.errors import UserError
from utils.tasks import Batch

LOSS, CORRECT, CORRECT5, SAMPLES = range(4)
"""Places in the totals."""


class ImageClassification:
    """Batches are images [B, 3, H, W] and int64 labels [B]; models return logits [B, classes].

    Losses and metrics are computed in float32 (float64 for float64 logits), whatever the model ran in. Training
    accuracy is that of the images' own labels, also where images are mixed.
    """

    def __init__(
        self,
        classes: int,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        test_flip: bool = False,
    ) -> None:
        """label_smoothing: share of the target spread over all classes. mixup, cutmix: alpha, 0 for none. test_flip:
        evaluation averages the logits of the image and its mirror."""
        self.classes = classes
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.cutmix = cutmix
        self.test_flip = test_flip

    def loss(self, model: nn.Module, batch: Batch, key: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean training loss and logits. `key` seeds mixup and cutmix; ValueError without it when they are on."""
        images, targets = batch
        if self.mixup > 0.0 or self.cutmix > 0.0:
            if key is None:
                raise ValueError("mixup and cutmix need a key")
            from utils.data.mixing import mix

            images, targets = mix(images, targets, self.classes, self.mixup, self.cutmix, key)
        logits = self._logits(model, images)
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing), logits

    def scoring_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Plain mean cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self._logits(model, images), labels)

    def totals(self, device: torch.device) -> Tensor:
        """Zeros [4]: loss sum, correct, correct in the top five, samples; float64 wherever the device has it."""
        return torch.zeros(4, dtype=_widest(device), device=device)

    @torch.no_grad()
    def accumulate(self, totals: Tensor, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch with mean loss `loss`, logits `outputs` and labels `targets` to `totals` in place."""
        totals += self._sums(loss.detach() * len(targets), outputs.detach(), targets)

    @torch.no_grad()
    def evaluate_batch(self, model: nn.Module, batch: Batch) -> Tensor:
        """The totals of one evaluation batch (which may be empty). The caller has put the model into eval mode."""
        images, labels = batch
        logits = self._logits(model, images)
        if self.test_flip:
            logits = (logits + self._logits(model, images.flip(-1))) / 2
        return self._sums(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)

    def read(self, totals: Tensor) -> dict[str, float]:
        """Mean loss, and accuracy and top-5 accuracy in percent. Raises ValueError when no sample was counted."""
        loss, correct, correct5, samples = totals.tolist()
        if samples == 0:
            raise ValueError("no samples were counted")
        return {"loss": loss / samples, "acc": 100.0 * correct / samples, "acc5": 100.0 * correct5 / samples}

    def _sums(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        rank = _rank_of_label(logits, labels)
        samples = torch.full_like(loss_sum, len(labels))
        parts = [loss_sum, (rank < 1).sum(), (rank < min(5, self.classes)).sum(), samples]
        return torch.stack([part.to(_widest(logits.device)) for part in parts])

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        logits = model(images)
        if not isinstance(logits, Tensor):
            raise UserError(
                f"{type(model).__name__} returns {type(logits).__name__}, not logits; "
                "build it with its auxiliary heads off"
            )
        if logits.dim() != 2 or logits.shape[1] != self.classes:
            raise UserError(
                f"{type(model).__name__} returns shape {tuple(logits.shape)}, not [batch, {self.classes} classes]; "
                "build it with a head for this data set"
            )
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes [B] come before the label's, by falling logit and then rising class number.

    Equal logits must not count as correct: a network pruned to a constant would be right about everything. Nor NaN, of
    which no comparison is true: it comes before the label, its own included.
    """
    own = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return (~(logits <= own) | ((logits == own) & before)).sum(1)
