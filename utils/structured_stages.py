"""How a level of a structured run trains: gates alone, gates and weights, or the weights of its own network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from utils import files, sparsity
from utils.data import Loaders
from utils.level_channels import Cut, LevelChannels
from utils.masks import Masks
from utils.params import Params
from utils.params.plan import Level
from utils.pruning import triggers
from utils.pruning.structured import Channels
from utils.pruning.structured.learn import ClampGates, GatedModel, GateTask
from utils.pruning.structured.stop import StopAtTrigger
from utils.pruning.structured.ticktock import GateColumns, GateImportance, TockTask, check_foldable, fold_gates
from utils.record import EpochsCsv, Row
from utils.rewinding import rate_of
from utils.system import distributed
from utils.system.console import Console, number
from utils.system.distributed import World
from utils.system.locks import Lock
from utils.system.rundir import LevelDir
from utils.system.stopping import Never, Stopped
from utils.tasks.classification import ImageClassification
from utils.training import checkpoint
from utils.training.averaging import ExponentialAverage
from utils.training.extension import Extension
from utils.training.gradient_norms import GradientNorms
from utils.training.optimizers import build_optimizer
from utils.training.parallel import synchronise_batchnorm, to_channels_last
from utils.training.recipe.smoothing import LabelSmoothing
from utils.training.schedules import lr_at
from utils.training.trainer import Stage, Trainer


@dataclass
class Trained:
    """A level that has trained: its network, the trainer that did it, a row per epoch, and the accuracy before."""

    cut: Cut
    trainer: Trainer
    rows: list[Row]
    pruned: float | None = None
    average: ExponentialAverage | None = None


class Stages:
    """Trains the levels of one run."""

    def __init__(
        self,
        params: Params,
        plan: list[Level],
        loaders: Loaders,
        channels: LevelChannels,
        world: World,
        device: torch.device,
        console: Console,
        stopping: Never,
    ) -> None:
        """Raises UserError for a network that cannot be trained as the config says."""
        self.params, self.plan, self.loaders, self.channels = params, plan, loaders, channels
        self.world, self.device, self.console, self.stopping = world, device, console, stopping
        self.options = task_options(params, loaders)
        if params.pruning.moment == "early":
            triggers.build(params.early, model=channels.searched, density=min(params.structured.keep))
        if params.pruning.moment == "ticktock":
            own = channels.channels
            check_foldable(
                channels.searched, lambda model: GatedModel(model, own.open, own.input_shape), own.input_shape
            )

    def begin(self, lock: Lock) -> None:
        """A level begins that `lock` keeps for this process."""
        self.lock, self.started = lock, time.perf_counter()

    def seconds(self) -> float:
        """Wall clock of the level, over all processes that worked on it."""
        return time.perf_counter() - self.started

    # What a level may do ------------------------------------------------------------------------------------------

    def gates(self, level: Level, place: LevelDir, source: str) -> Trained:
        """Learn gates on frozen random weights (Pruning from Scratch) and write them."""
        section = self.params.structured
        cut = self.channels.whole()
        gated = GatedModel(self._placed(cut.model), self.channels.channels.open, self.channels.input_shape)
        task = GateTask(gated, section.gate_target, section.gate_penalty, **self.options)
        trainer = self._trainer(gated, task)
        self._say(level, gated, "frozen random weights")
        # As published, whatever the config says about the training of weights: Adam, constant rate, no decay.
        adam = replace(
            self.params.optimizer, name="adam", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, nesterov=False
        )
        optimizer = build_optimizer(gated.values, adam, self.device)
        stage = Stage(level.number, level.epochs, lambda step: section.gate_lr)
        rows = self._fit(stage, optimizer, trainer, gated, [ClampGates(gated)], place)
        self._write_gates(place, {name: gate.detach() for name, gate in gated.gates.items()}, source)
        return Trained(Cut(gated.model, cut.kept), trainer, rows)

    def tick(self, level: Level, place: LevelDir) -> Trained:
        """Train gates on the source's weights, and write what they say of every unit."""
        assert level.source is not None
        cut = self.channels.of_level(level.source)
        source = files.digest(files.state_of(cut.model))
        gated = self._gated(cut, frozen=True)
        trainer = self._trainer(gated, ImageClassification(**self.options))  # type: ignore[arg-type]
        self._say(level, gated, f"the weights of level {level.source}")
        optimizer = build_optimizer(gated.values, replace(self.params.optimizer, weight_decay=0.0), self.device)
        importance = GateImportance(gated, lambda: trainer.scaler.get_scale())
        stage = Stage(level.number, level.epochs, lambda step: self.params.structured.gate_lr)
        rows = self._fit(stage, optimizer, trainer, gated, [importance], place)
        self._write_gates(place, importance.sums, source)
        return Trained(replace(cut, model=fold_gates(gated)), trainer, rows)

    def tock(self, level: Level, place: LevelDir, cut: Cut) -> Trained:
        """Train what is left after a tick, gates and weights."""
        gated = self._gated(cut, frozen=False)
        task = TockTask(gated, self.params.structured.tock_penalty, **self.options)
        trainer = self._trainer(gated, task)
        pruned = self._accuracy(trainer)
        optimizer = build_optimizer(gated, self.params.optimizer, self.device)
        rows = self._fit(self._stage(level, trainer), optimizer, trainer, gated, [GateColumns(gated)], place)
        return Trained(replace(cut, model=fold_gates(gated)), trainer, rows, pruned)

    def weights(self, level: Level, place: LevelDir, cut: Cut) -> Trained:
        """Train the level's network."""
        task = ImageClassification(**self.options)  # type: ignore[arg-type]
        trainer = self._trainer(self._placed(cut.model), task)
        pruned = self._accuracy(trainer) if level.rewind is not None else None
        distributed.agree(f"weights at level {level.number} start", lambda: files.digest(files.state_of(trainer.model)))
        optimizer = build_optimizer(trainer.model, self.params.optimizer, self.device)
        stage = self._stage(level, trainer)
        extensions, average = self._extensions(level, stage, trainer, place, cut.masks)
        rows = self._fit(stage, optimizer, trainer, trainer.model, extensions, place, cut.masks)
        return Trained(cut, trainer, rows, pruned, average)

    # Pieces -------------------------------------------------------------------------------------------------------

    def _extensions(
        self, level: Level, stage: Stage, trainer: Trainer, place: LevelDir, masks: Masks | None
    ) -> tuple[list[Extension], ExponentialAverage | None]:
        params, per_epoch, found = self.params, trainer.steps_per_epoch, list[Extension]()
        if params.recipe.smoothing.schedule is not None and level.epochs:
            found.append(LabelSmoothing(trainer.task, params.recipe, level.epochs * per_epoch, per_epoch, 0))
        if params.training.gradient_norms:
            out = place.gradients if self.world.main else None
            steps = params.training.gradient_norms
            found.append(GradientNorms(trainer.model, steps, 0, lambda: trainer.scaler.get_scale(), out))
        average = None
        if params.training.ema is not None:
            average = ExponentialAverage(trainer.model, params.training.ema)
            if masks is not None:
                average.masks_changed(masks)
            found.append(average)
        if params.pruning.moment == "early" and level.number == 0:
            trigger = triggers.build(params.early, model=trainer.model, density=min(params.structured.keep))
            latest = params.early.latest.at(per_epoch) if params.early.latest is not None else None
            found.append(StopAtTrigger(trainer.model, stage, trigger, per_epoch, latest))
        return found, average

    def _fit(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        trainer: Trainer,
        model: nn.Module,
        extensions: list[Extension],
        place: LevelDir,
        masks: Masks | None = None,
    ) -> list[Row]:
        """Train a stage, from where a process before left it. Channels that are pruned are not there; single weights
        are outside `masks`."""
        self.console.restart_table()
        held = sparsity.attach(model, optimizer, Masks({}) if masks is None else masks)
        keeper = self._keeper(stage.level, place, model)
        if found := keeper.find():
            self.started -= found.notes["seconds"]
        keeper.notes = lambda: {"seconds": self.seconds()}
        if reason := self.stopping.poll().stop:
            raise Stopped(reason)
        with EpochsCsv(place.epochs if self.world.main else None, keeper.rows) as table:

            def on_epoch(row: Row) -> None:
                table.write(row)
                names = ("train_loss", "train_acc", "val_acc", "test_acc", "gates_mean", "images_per_second", "seconds")
                cells = [(name, number(row.get(name))) for name in names if row.get(name) is not None]
                self.console.row([("epoch", f"{row['epoch'] + 1}/{stage.epochs}"), ("lr", f"{row['lr']:.4g}"), *cells])

            rows = trainer.fit(stage, optimizer, held, extensions, on_epoch, keeper)
        for extension in reversed(extensions):
            extension.close()
        if masks is not None and (bad := held.violations()):
            raise RuntimeError(f"level {stage.level}: pruned weights of {bad[0]!r} are not 0.0")
        held.detach()
        return rows

    def _keeper(self, level: int, place: LevelDir, model: nn.Module) -> checkpoint.Checkpoints:
        """Stores the state inside the level, for a process that begins it with the same network and weights."""
        return checkpoint.Checkpoints(
            place,
            self.params.run,
            model,
            level=level,
            key=files.digest(files.state_of(model)),
            world=self.world,
            console=self.console,
            check=self.lock.check,
        )

    def _stage(self, level: Level, trainer: Trainer) -> Stage:
        return Stage(level.number, level.epochs, self._rate(level, trainer.steps_per_epoch))

    def _rate(self, level: Level, per_epoch: int) -> Callable[[int], float]:
        """The learning rate as a function of the step; Scratch-B stretches the schedule, milestones included."""
        params = self.params
        if params.structured.scratch != "b" or level.density == 1.0:
            return rate_of(params, self.plan, level, per_epoch)
        epochs, total = params.training.epochs, params.training.epochs * per_epoch
        return lambda step: lr_at(step * epochs // level.epochs, params.schedule, params.optimizer.lr, total, per_epoch)

    def _gated(self, cut: Cut, frozen: bool) -> GatedModel:
        """The network of `cut` with gates of 1, on the device."""
        own: Channels = self.channels.follow(cut)
        return GatedModel(self._placed(cut.model), own.open, own.input_shape, frozen)

    def _placed(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        if self.params.distributed.sync_batchnorm:
            model = synchronise_batchnorm(model, self.device)
        if self.params.training.channels_last:
            to_channels_last(model)
        return model

    def _trainer(self, model: nn.Module, task: ImageClassification) -> Trainer:
        return Trainer(
            model,
            task,
            self.loaders,
            self.params.training,
            self.params.distributed,
            seed=self.params.run.seed,
            world=self.world,
            device=self.device,
            console=self.console,
            stopping=self.stopping,
        )

    def _accuracy(self, trainer: Trainer) -> float:
        return float(trainer.evaluate(self.loaders.test)["acc"])

    def _say(self, level: Level, gated: GatedModel, where: str) -> None:
        self.console.line(f"level {level.number}: learning {len(gated.all())} gates on {where}")

    def _write_gates(self, place: LevelDir, found: dict[str, torch.Tensor], source: str) -> None:
        distributed.agree("gates", files.digest(found))
        distributed.from_main(lambda: files.save_tensors(place.gates, found, {"source": source}))


def task_options(params: Params, loaders: Loaders) -> dict[str, object]:
    """What the config says about the task, as arguments of `ImageClassification`."""
    return {
        "classes": loaders.spec.classes,
        "label_smoothing": params.training.label_smoothing,
        "mixup": params.data.mixup,
        "cutmix": params.data.cutmix,
        "test_flip": params.training.test_flip,
    }
