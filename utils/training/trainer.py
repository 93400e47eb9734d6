"""The trainer: epochs of masked training and evaluation of one model. It knows no pruning method.

Read it top to bottom: `fit` runs a stage epoch by epoch, `_train_epoch` its steps, `evaluate` a split. Losses stay on
the device; they are looked at every `training.check_every` steps and reduced over ranks once per epoch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from utils import params
from utils.data import Loaders
from utils.data.protocol import Loader
from utils.data.stateless import derive
from utils.files import state_of
from utils.sparsity import Sparsity
from utils.system.console import Console
from utils.system.distributed import World, sum_over_ranks
from utils.system.errors import UserError
from utils.tasks.classification import ImageClassification
from utils.training import precision
from utils.training.averaging import ExponentialAverage
from utils.training.batchnorm import average_statistics, averaged_statistics
from utils.training.extension import Extension
from utils.training.parallel import warm, wrap

Row = dict[str, Any]


@dataclass
class Stage:
    """One level's training. Extensions may change `epochs` and `lr` while it runs; both are read anew every time.

    epochs      length of the schedule; training ends at its last step. May change up to the end of the last epoch;
                images that grow with training then follow the new length
    start       optimizer step training begins at (`wr` continues the schedule of the rewind step)
    lr          learning rate at a step
    marks       step -> called once the step's predecessors are done and before the step itself (rewind points)
    """

    level: int
    epochs: int
    lr: Callable[[int], float]
    start: int = 0
    marks: dict[int, Callable[[], None]] = field(default_factory=dict)


class Trainer:
    """Trains one model for any number of stages. The model keeps its identity: wrapping happens once."""

    def __init__(
        self,
        model: nn.Module,
        task: ImageClassification,
        loaders: Loaders,
        training: params.Training,
        distributed: params.Distributed,
        *,
        seed: int,
        world: World,
        device: torch.device,
        console: Console,
    ) -> None:
        """`model` is on `device`, in its final memory format, and bitwise the same on every rank."""
        self.model = model
        self.task = task
        self.loaders = loaders
        self.section = training
        self.seed = seed
        self.world = world
        self.device = device
        self.console = console
        self.dtype = precision.choose(training.precision, device)
        self.wrapped: Any = wrap(model, distributed, device)
        # Evaluation goes around DDP: ranks may have different numbers of batches there.
        self.forward: Any = torch.compile(model) if training.compile else model
        self.steps_per_epoch = len(loaders.train) // training.accumulation
        warm(self.wrapped, model, self._dummy_backward, world)
        if training.compile:
            # After the warm-up: its batch of two would make dynamo compile for any batch size.
            self.wrapped = torch.compile(self.wrapped)

    def fit(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        sparsity: Sparsity,
        extensions: Sequence[Extension] = (),
        on_epoch: Callable[[Row], None] = lambda row: None,
    ) -> list[Row]:
        """Train the stage; one row per epoch, handed to `on_epoch` as it ends.

        Raises UserError when a loss is NaN or infinite, naming level, step and rank.
        """
        self.scaler = precision.scaler(self.device, self.dtype)
        step, rows = stage.start, []
        self._mark(stage, step)
        while step < stage.epochs * self.steps_per_epoch:
            epoch = step // self.steps_per_epoch
            begin = time.perf_counter()
            row: Row = {"level": stage.level, "epoch": epoch, "lr": stage.lr(step)}
            step, measured = self._train_epoch(stage, epoch, step, optimizer, sparsity, extensions)
            row |= {"step": step, **measured}
            for extension in extensions:
                row |= extension.epoch_end(epoch)
            if (epoch + 1) % self.section.eval_every == 0 or epoch + 1 >= stage.epochs:
                row |= self.evaluate_all(extensions)
            row["seconds"] = time.perf_counter() - begin
            rows.append(row)
            on_epoch(row)
        return rows

    def _train_epoch(
        self,
        stage: Stage,
        epoch: int,
        step: int,
        optimizer: torch.optim.Optimizer,
        sparsity: Sparsity,
        extensions: Sequence[Extension],
    ) -> tuple[int, Row]:
        """Steps from `step` to the end of `epoch`. Returns the step reached and the epoch's measurements."""
        accumulation = self.section.accumulation
        first = step - epoch * self.steps_per_epoch
        self._seed_epoch(stage.level, epoch)
        size = self.loaders.spec.size_at(epoch / max(stage.epochs, 1))
        self.loaders.train.set_epoch(stage.level, epoch, start_batch=first * accumulation, size=size)
        self.model.train()
        totals = self.task.totals(self.device)
        clock = _Clock(self.device)
        count = (self.steps_per_epoch - first) * accumulation
        label = f"level {stage.level} epoch {epoch + 1}/{stage.epochs}"
        batches = self.console.progress(clock.waits(self.loaders.train), count, label)
        number, dense = -1, False
        for number, batch in enumerate(batches):
            last = (number + 1) % accumulation == 0
            if number % accumulation == 0:
                dense = self._begin_step(step, sparsity, extensions)
            self._backward(
                batch, totals, derive("mix", self.seed, stage.level, step, number % accumulation, self.world.rank), last
            )
            if last:
                self._end_step(stage, step, dense, optimizer, sparsity, extensions)
                step += 1
                if step % self.section.check_every == 0:
                    self._check_losses(totals, stage, step, optimizer.param_groups[0]["lr"])
                self._mark(stage, step)
        if step != (epoch + 1) * self.steps_per_epoch:
            raise RuntimeError(f"the loader ended after {number + 1} of {count} batches")
        self._check_losses(totals, stage, step, optimizer.param_groups[0]["lr"])
        average_statistics(self.model)
        seconds, waited = clock.stop()
        read = self.task.read(sum_over_ranks(totals))
        images = (self.steps_per_epoch - first) * self.section.batch_size
        return step, {
            "train_loss": read["loss"],
            "train_acc": read["acc"],
            "images_per_second": images / seconds,
            "data_wait": waited / seconds,
        }

    def _backward(self, batch: tuple[torch.Tensor, torch.Tensor], totals: torch.Tensor, key: int, last: bool) -> None:
        """Forward and backward of one micro-batch; gradients are reduced over ranks with the last one only."""
        with self._reduction(last):
            with precision.autocast(self.device, self.dtype):
                loss, logits = self.task.loss(self.wrapped, batch, key)
            self.scaler.scale(loss / self.section.accumulation).backward()
        self.task.accumulate(totals, loss, logits, batch[1])

    def _reduction(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        no_sync = getattr(self.wrapped, "no_sync", None)
        return contextlib.nullcontext() if last or no_sync is None else no_sync()

    def _begin_step(self, step: int, sparsity: Sparsity, extensions: Sequence[Extension]) -> bool:
        """`before_step` of all; returns whether gradients are left dense from here on."""
        dense = any(e.needs_dense_grad(step) for e in extensions)
        for extension in extensions:
            extension.before_step(step)
        sparsity.dense_gradients(dense)  # last, for a pruning in between switches it too
        return dense

    def _end_step(
        self,
        stage: Stage,
        step: int,
        dense: bool,
        optimizer: torch.optim.Optimizer,
        sparsity: Sparsity,
        extensions: Sequence[Extension],
    ) -> None:
        """The optimizer's step or the updates in its place, then `after_step`; gradients are cleared."""
        sparsity.dense_gradients(False)
        for extension in extensions:
            extension.after_backward(step)
        updates = [e for e in extensions if e.replaces_step(step)]
        if updates:
            self.scaler.unscale_(optimizer)
            for extension in updates:
                extension.update(step)
            self.scaler.update()
        else:
            if dense:
                sparsity.project()
            self._optimizer_step(optimizer, stage.lr(step))
        for extension in extensions:
            if extension not in updates:
                extension.after_step(step)
        optimizer.zero_grad(set_to_none=True)

    def _optimizer_step(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if self.section.clip is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.section.clip)
        self.scaler.step(optimizer)
        self.scaler.update()

    def evaluate_all(self, extensions: Sequence[Extension] = ()) -> Row:
        """Loss and accuracies of val (None without one) and test, of the averaged weights where there is an average."""
        averages = [e for e in extensions if isinstance(e, ExponentialAverage)]
        with averages[0].swapped() if averages else contextlib.nullcontext():
            val = self.evaluate(self.loaders.val) if self.loaders.val is not None else None
            test = self.evaluate(self.loaders.test)
        return {
            "val_loss": val and val["loss"],
            "val_acc": val and val["acc"],
            "test_loss": test["loss"],
            "test_acc": test["acc"],
            "test_acc_top5": test["acc5"],
        }

    @torch.no_grad()
    def evaluate(self, loader: Loader) -> dict[str, float]:
        """Mean loss, accuracy and top-5 accuracy (percent) of the model over a split; every sample counts once."""
        self.forward.eval()
        totals = self.task.totals(self.device)
        with precision.autocast(self.device, self.dtype):
            for batch in loader:
                totals += self.task.evaluate_batch(self.forward, batch)
        self.forward.train()
        return self.task.read(sum_over_ranks(totals))

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """The model's state with BatchNorm statistics averaged over ranks; the model itself stays as it is."""
        return state_of(self.model) | averaged_statistics(self.model)

    def _check_losses(self, totals: torch.Tensor, stage: Stage, step: int, lr: float) -> None:
        # The sum keeps a NaN or an infinity, so a look now and then misses none.
        if not math.isfinite(float(totals[0])):
            raise UserError(
                f"level {stage.level}, step {step}, rank {self.world.rank}: the loss became {float(totals[0])} at "
                f"learning rate {lr:g}; lower optimizer.lr, add schedule.warmup or training.clip"
            )

    def _mark(self, stage: Stage, step: int) -> None:
        if step in stage.marks:
            stage.marks[step]()

    def _seed_epoch(self, level: int, epoch: int) -> None:
        # Dropout and the like then depend on where training is, not on what the process did before.
        torch.manual_seed(derive("training", self.seed, level, epoch, self.world.rank))

    def _dummy_backward(self, wrapped: nn.Module) -> None:
        side = self.loaders.spec.image_size
        images = torch.zeros(2, 3, side, side, device=self.device)
        if self.section.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with precision.autocast(self.device, self.dtype):
            loss = wrapped(images).float().sum()
        loss.backward()


class _Clock:
    """Wall time of an epoch and the part of it spent waiting for data."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin = time.perf_counter()
        self.waited = 0.0

    def waits(self, loader: Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The loader's batches, timing each wait."""
        iterator = iter(loader)
        while True:
            begin = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def stop(self) -> tuple[float, float]:
        """Seconds since the start and seconds waited, once the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.begin, self.waited
