"""The trainer: epochs of masked training and evaluation of one model. It knows no pruning method.

Read it top to bottom: `fit` runs a stage epoch by epoch, `_train_epoch` its steps, `evaluate` a split. Losses stay on
the device; they are looked at every `training.check_every` steps and reduced over ranks once per epoch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NoReturn

import torch
from torch import nn

from utils import params
from utils.data import Loaders
from utils.data.protocol import Loader
from utils.data.stateless import derive
from utils.files import state_of
from utils.sparsity import Sparsity
from utils.system.console import Console
from utils.system.distributed import World, gather, sum_over_ranks
from utils.system.errors import Preempted
from utils.system.stopping import Never, Stopped
from utils.tasks.classification import ImageClassification
from utils.training import precision, reduction
from utils.training.averaging import ExponentialAverage
from utils.training.batchnorm import average_statistics, averaged_statistics
from utils.training.extension import Extension
from utils.training.masked_update import MaskedUpdate, Unfit
from utils.training.parallel import warm, wrap
from utils.training.progress import Keeper, Live, Progress, Row, Stage
from utils.training.watch import Clock, LossWatch

__all__ = ["Row", "Stage", "Trainer"]


class Gradients(Enum):
    """What a step's gradients show at pruned places as they come: 0.0; their own; or anything, masked at the end."""

    MASKED, DENSE, LATE = range(3)


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
        stopping: Never | None = None,
    ) -> None:
        """`model` is on `device`, in its final memory format, and bitwise the same on every rank.

        stopping: asked between steps, and between batches of an evaluation, whether to end.
        """
        self.model = model
        self.task = task
        self.loaders = loaders
        self.section = training
        self.seed = seed
        self.world = world
        self.device = device
        self.console = console
        self.stopping = stopping or Never()
        self._shared: dict[int, int] = {}
        self.dtype = precision.choose(training.precision, device)
        self.wrapped: Any = wrap(model, distributed, device)
        self.reduction = reduction.install(self.wrapped, distributed, world, device)
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
        keeper: Keeper | None = None,
    ) -> list[Row]:
        """Train the stage; one row per epoch, handed to `on_epoch` as it ends.

        keeper: stores the state of training and puts back what it stored; training then goes on from there, and the
        rows of the epochs before come first.

        Raises UserError when a loss is NaN or infinite, naming level, step and rank; Preempted, on all ranks after the
        same step and with the state stored, when a stop was asked for.
        """
        if self.reduction is not None:
            self.reduction.follow(sparsity)
        self.scaler = precision.scaler(self.device, self.dtype)
        self.losses = LossWatch(stage.level, self.world.rank, self.scaler.is_enabled())
        keeper = keeper or Keeper()
        progress = Progress(stage.start // self.steps_per_epoch, stage.start)
        live = Live(stage, optimizer, sparsity, extensions, self.scaler, progress, self._update(optimizer, sparsity))
        if not keeper.restore(live):
            self._mark(stage, progress.step)
        while progress.epoch < stage.epochs:
            if progress.row is None:
                self._train_epoch(live, keeper)
                self._end_epoch(live)
            try:
                self._evaluate_epoch(live)
            except Stopped as stopped:
                self._preempt(live, keeper, stopped.reason)
            progress.next_epoch()
            keeper.epoch_done(live)
            on_epoch(progress.rows[-1])
        return progress.rows

    def _train_epoch(self, live: Live, keeper: Keeper) -> None:
        """The steps that are left of the epoch at work."""
        stage, progress, accumulation = live.stage, live.progress, self.section.accumulation
        epoch = progress.epoch
        first = progress.step - epoch * self.steps_per_epoch
        self._begin_epoch(live)
        assert progress.totals is not None
        self.loaders.train.set_epoch(stage.level, epoch, start_batch=first * accumulation, size=progress.size)
        self.model.train()
        clock = Clock(self.device)
        count = (self.steps_per_epoch - first) * accumulation
        label = f"level {stage.level} epoch {epoch + 1}/{stage.epochs}"
        batches = self.console.progress(clock.waits(self.loaders.train), count, label) if count else iter(())
        number, gradients = -1, Gradients.MASKED
        for number, batch in enumerate(batches):
            last = (number + 1) % accumulation == 0
            step = progress.step
            if number % accumulation == 0:
                gradients = self._begin_step(step, live)
            key = derive("mix", self.seed, stage.level, step, number % accumulation, self.world.rank)
            self._backward(batch, progress.totals, key, last, step, stage.lr(step))
            if last:
                self._end_step(step, gradients, live)
                progress.step += 1
                progress.images += self.section.batch_size
                if progress.step % self.section.check_every == 0:
                    self.losses.check(progress.totals, keeper.last())
                self._mark(stage, progress.step)
                self._poll(live, keeper, clock)
        if progress.step != (epoch + 1) * self.steps_per_epoch:
            raise RuntimeError(f"the loader ended after {number + 1} of {count} batches")
        self.losses.check(progress.totals, keeper.last())
        clock.stop(progress)

    def _begin_epoch(self, live: Live) -> None:
        """Settle what an epoch begins with, unless it was begun before a resume."""
        stage, progress = live.stage, live.progress
        if progress.lr is None:
            self._seed_epoch(stage.level, progress.epoch)
            progress.lr = stage.lr(progress.step)
            progress.size = self.loaders.spec.size_at(progress.epoch / max(stage.epochs, 1))
        zeros = self.task.totals(self.device)
        progress.totals = zeros if progress.totals is None else zeros.copy_(progress.totals)

    def _end_epoch(self, live: Live) -> None:
        """What follows an epoch's last step: averaged statistics, measurements, extensions."""
        stage, progress = live.stage, live.progress
        assert progress.totals is not None
        average_statistics(self.model)
        read = self.task.read(sum_over_ranks(progress.totals.clone()))
        row: Row = {
            "level": stage.level,
            "epoch": progress.epoch,
            "lr": progress.lr,
            "step": progress.step,
            "train_loss": read["loss"],
            "train_acc": read["acc"],
            "images_per_second": progress.images / progress.seconds,
            "data_wait": progress.waited / progress.seconds,
        }
        for extension in live.extensions:
            row |= extension.epoch_end(progress.epoch)
        progress.row = row

    def _evaluate_epoch(self, live: Live) -> None:
        """The epoch's evaluation. Raises Stopped where a stop was asked for meanwhile, as if it had not begun."""
        begin, progress = time.perf_counter(), live.progress
        assert progress.row is not None
        row = dict(progress.row)
        if (progress.epoch + 1) % self.section.eval_every == 0 or progress.epoch + 1 >= live.stage.epochs:
            row |= self.evaluate_all(live.extensions)
        row["seconds"] = progress.seconds + time.perf_counter() - begin
        progress.row = row

    def _poll(self, live: Live, keeper: Keeper, clock: Clock) -> None:
        """Between two steps: store the state when the ranks agree that it is time, and end when they agree to stop."""
        answer = self.stopping.poll(keeper.due())
        if not (answer.stop or answer.due):
            return
        assert live.progress.totals is not None
        self.losses.check(live.progress.totals, keeper.last())
        clock.stop(live.progress)
        if answer.stop:
            self._preempt(live, keeper, answer.stop)
        keeper.save(live)

    def _preempt(self, live: Live, keeper: Keeper, reason: str) -> NoReturn:
        self.stopping.drain()
        raise Preempted(f"stopped by {reason}; the same command goes on from {keeper.save(live)}")

    def _backward(
        self, batch: tuple[torch.Tensor, torch.Tensor], totals: torch.Tensor, key: int, last: bool, step: int, lr: float
    ) -> None:
        """Forward and backward of one micro-batch; gradients are reduced over ranks with the last one only."""
        with self._reduction(last):
            with precision.autocast(self.device, self.dtype):
                loss, logits = self.task.loss(self.wrapped, batch, key)
            self.scaler.scale(loss / self.section.accumulation).backward()
        with self.losses.counted(totals, step, lr, loss.detach()):
            self.task.accumulate(totals, loss, logits, batch[1])

    def _reduction(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        no_sync = getattr(self.wrapped, "no_sync", None)
        return contextlib.nullcontext() if last or no_sync is None else no_sync()

    def _update(self, optimizer: torch.optim.Optimizer, sparsity: Sparsity) -> MaskedUpdate | None:
        """The one pass for step and masks; None where gradients are looked at before each step, or it does not fit."""
        if self.section.clip is not None or self.scaler.is_enabled():
            return None
        update, told = None, ""
        try:
            update = MaskedUpdate(optimizer, sparsity)
        except Unfit as unfit:
            told = str(unfit) if unfit.told else ""
        # All ranks or none: gradients that one rank masks as they come and others do not would be averaged.
        answers = gather((update is not None, told))
        reasons = [reason for _, reason in answers if reason]
        if reasons:
            self.console.line(f"masks take passes of their own, slower: {reasons[0]}")
        return update if all(fit for fit, _ in answers) else None

    def _begin_step(self, step: int, live: Live) -> Gradients:
        """`before_step` of all; returns what gradients show at pruned places from here on."""
        dense = any(e.needs_dense_grad(step) for e in live.extensions)
        for extension in live.extensions:
            extension.before_step(step)
        read = any(e.replaces_step(step) or e.reads_gradients(step) for e in live.extensions)
        # A GPU masks all gradients in one go, before anything reads them, faster than one by one in the backward pass.
        late = not dense and (self.device.type == "cuda" or not (read or live.update is None))
        live.sparsity.dense_gradients(dense)  # last, for a pruning in between switches it too
        live.sparsity.late_gradients(late)
        return Gradients.DENSE if dense else Gradients.LATE if late else Gradients.MASKED

    def _end_step(self, step: int, gradients: Gradients, live: Live) -> None:
        """The optimizer's step or the updates in its place, then `after_step`; gradients are cleared."""
        live.sparsity.dense_gradients(False)
        live.sparsity.late_gradients(False)
        if gradients is Gradients.LATE and live.update is None:
            live.sparsity.mask_gradients()
        for extension in live.extensions:
            extension.after_backward(step)
        updates = [e for e in live.extensions if e.replaces_step(step)]
        if updates:
            self.scaler.unscale_(live.optimizer)
            for extension in updates:
                extension.update(step)
            self.scaler.update()
        else:
            if gradients is Gradients.DENSE:
                live.sparsity.project()
            self._optimizer_step(live, live.stage.lr(step), live.update if gradients is Gradients.LATE else None)
        for extension in live.extensions:
            if extension not in updates:
                extension.after_step(step)
        live.optimizer.zero_grad(set_to_none=True)

    def _optimizer_step(self, live: Live, lr: float, update: MaskedUpdate | None) -> None:
        for group in live.optimizer.param_groups:
            group["lr"] = lr
        if update is not None:
            update.step()
            return
        if self.section.clip is not None:
            self.scaler.unscale_(live.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.section.clip)
        self.scaler.step(live.optimizer)
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
        """Mean loss, accuracy and top-5 accuracy (percent) of the model over a split; every sample counts once.

        Raises Stopped, on all ranks at the same batch, when a stop was asked for.
        """
        self.forward.eval()
        totals = self.task.totals(self.device)
        shared = self._shared_batches(loader)
        with precision.autocast(self.device, self.dtype):
            for number, batch in enumerate(loader):
                totals += self.task.evaluate_batch(self.forward, batch)
                if number < shared and (reason := self.stopping.poll().stop):
                    raise Stopped(reason)
        self.forward.train()
        return self.task.read(sum_over_ranks(totals))

    def _shared_batches(self, loader: Loader) -> int:
        """How many batches every rank has: up to there the ranks can agree on something after each of them."""
        if id(loader) not in self._shared:
            self._shared[id(loader)] = min(gather(len(loader)))
        return self._shared[id(loader)]

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """The model's state with BatchNorm statistics averaged over ranks; the model itself stays as it is."""
        return state_of(self.model) | averaged_statistics(self.model)

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
