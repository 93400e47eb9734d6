"""The driver of structured runs: learn gates or train the whole network, take channels out, train what is left.

Every level has a network of its own, so it is built, wrapped and trained anew; files, records and the skipping of what
is done are those of the other runs. A level's network is in its widths.json and weights.safetensors:
`models.rebuild(widths, weights)` gives it back.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from utils import data, files, reporting, sparsity
from utils.data.order import Shard
from utils.level_channels import Cut, LevelChannels
from utils.masks import Masks
from utils.owned import own_level
from utils.params import Params
from utils.params.checks import check_ranks
from utils.params.plan import Level, level_plan
from utils.pruning import triggers
from utils.pruning.report import write_layers_csv
from utils.pruning.structured.learn import ClampGates, GatedModel, GateTask
from utils.pruning.structured.stop import StopAtTrigger
from utils.record import EpochsCsv, Outcome, Record, Row, run_dir
from utils.rewinding import rate_of
from utils.system import distributed
from utils.system.atomic import write_json
from utils.system.console import Console, number
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.system.locks import Lock
from utils.system.rundir import LevelDir, RunDir
from utils.system.stopping import Never, Stopped
from utils.tasks.classification import ImageClassification
from utils.training import checkpoint, precision
from utils.training.extension import Extension
from utils.training.measure import measure
from utils.training.optimizers import build_optimizer
from utils.training.parallel import synchronise_batchnorm, to_channels_last
from utils.training.schedules import lr_at
from utils.training.trainer import Stage, Trainer


class StructuredDriver:
    """One structured run: its directory, its data, and the levels of its plan."""

    def __init__(
        self,
        params: Params,
        world: World,
        device: torch.device,
        console: Console,
        stopping: Never | None = None,
    ) -> None:
        """Builds and checks everything a level needs; writes nothing. Raises UserError for input that cannot work.

        stopping: asked between steps whether to store the state and end.
        """
        check_ranks(params, world.size)
        self.params, self.world, self.device, self.console = params, world, device, console
        self.stopping = stopping or Never()
        self.plan = level_plan(params)
        training = params.training
        shard = Shard(world.rank, world.size, training.batch_size, training.accumulation)
        workers = params.data.workers or data.default_workers(world.local_size)
        self.loaders = data.build(params, shard, device, training.channels_last, workers)
        try:
            self.options = {
                "classes": self.loaders.spec.classes,
                "label_smoothing": training.label_smoothing,
                "mixup": params.data.mixup,
                "cutmix": params.data.cutmix,
                "test_flip": training.test_flip,
            }
            self.task = ImageClassification(**self.options)  # type: ignore[arg-type]
            self.channels = LevelChannels(params, self.loaders, self.task, run_dir(params), world, device)
            if params.pruning.moment == "early":
                triggers.build(params.early, model=self.channels.searched, density=min(params.structured.keep))
            self.initial_digest = files.digest(self.channels.initial)
            distributed.agree("initial weights", self.initial_digest)
            self.dtype = precision.choose(training.precision, device)
            self.record = Record(params, self.loaders, self.dtype, world, device)
        except BaseException:
            self.loaders.close()
            raise

    @property
    def dir(self) -> RunDir:
        """The run's directory."""
        return self.record.dir

    def run(self) -> RunDir:
        """Run every level of the plan that is not done yet, or `levels.only` alone.

        Raises Preempted and Busy as `levels.Driver.run` does.
        """
        try:
            wanted = self._wanted()
            distributed.from_main(self.record.start)
            for level in wanted:
                done, work = functools.partial(self._done, level), functools.partial(self._level, level)
                own_level(level.number, self.dir, self.world, self.console, done, work)
            distributed.from_main(functools.partial(self.record.finish, [level.number for level in self.plan]))
        finally:
            self.loaders.close()
        return self.dir

    def _wanted(self) -> list[Level]:
        only = self.params.levels.only
        if only is None:
            return self.plan
        level = self.plan[only]
        if level.source is not None and not distributed.exists(self.dir.level(level.source).row):
            raise UserError(
                f"levels.only={only}: level {level.source} it starts from is not done in {self.dir.path}; run it first"
            )
        return [level]

    def _done(self, level: Level, ours: bool) -> bool:
        """Whether the level's row is there and not older than that of the level it starts from. Rank 0 looks.

        ours: the level is locked by this process; a row made from other weights is then removed.
        """
        place = self.dir.level(level.number)
        if not place.row.exists():
            return False
        before = None
        if level.source is not None:
            before = reporting.read_row(self.dir.level(level.source).row)["weights_digest"]
        if before is None or (place.origin.exists() and place.origin.read_text(encoding="utf-8") == before):
            if self.params.run.keep != "all":
                checkpoint.remove(place)
            return True
        if ours:
            self.console.line(f"level {level.number}: was made from other weights, running it again")
            place.row.unlink()
        return False

    # Stages -------------------------------------------------------------------------------------------------------

    def _level(self, level: Level, lock: Lock) -> None:
        """Learn gates, or take channels out and train what is left; then record it."""
        self._begin, self._lock = time.perf_counter(), lock
        place = self.dir.level(level.number)
        gates = self.params.structured.criterion == "gates"
        if gates and level.number == 0:
            cut, trainer, rows = self._learn_gates(level, place)
            pruned = None
        else:
            cut = self._cut(level, place)
            self._tell(level, cut)
            trainer = self._trainer(cut.model, self.task)
            pruned = float(trainer.evaluate(self.loaders.test)["acc"]) if level.rewind is not None else None
            rows = self._train(level, place, trainer)
        final = rows[-1] if rows else trainer.evaluate_all()
        row = self._row(level, cut, rows, final, pruned)
        distributed.from_main(lock.check)
        distributed.from_main(functools.partial(self._save, level, place, cut, row))
        self.console.row(
            [
                ("level", str(level.number)),
                ("macs", f"{row['macs'] / 1e6:.2f} M"),
                ("val_acc", number(row["val_acc"])),
                ("test_acc", number(row["final_test_acc"])),
                ("seconds", f"{time.perf_counter() - self._begin:.1f}"),
            ]
        )
        self.console.restart_table()

    def _cut(self, level: Level, place: LevelDir) -> Cut:
        """The network the level trains, with the weights it starts from."""
        gates: dict[str, torch.Tensor] = {}
        if self.params.structured.criterion == "gates":
            path = self.dir.level(0).gates
            if not distributed.exists(path):
                raise UserError(f"{path}: missing, level {level.number} prunes by it; run level 0 again")
            gates = files.load_tensors(path)[0]
        whole = level.density == 1.0 and level.number == 0 and not gates and self.params.pruning.moment != "init"
        if whole:
            return self.channels.whole()
        source = self.channels.whole() if gates or level.source is None else self.channels.of_level(level.source)
        return self.channels.cut(level, place, source, gates, self.console)

    def _learn_gates(self, level: Level, place: LevelDir) -> tuple[Cut, Trainer, list[Row]]:
        section = self.params.structured
        cut = self.channels.whole()
        model = self._placed(cut.model)
        gated = GatedModel(model, self.channels.channels.open, self.channels.input_shape)
        task = GateTask(gated, section.gate_target, section.gate_penalty, **self.options)
        trainer = self._trainer(gated, task, placed=True)
        self.console.line(f"level {level.number}: learning {len(gated.all())} gates on frozen random weights")
        self.console.restart_table()
        # As published, whatever the config says about the training of weights: Adam, constant rate, no decay.
        adam = replace(
            self.params.optimizer, name="adam", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, nesterov=False
        )
        optimizer = build_optimizer(gated.values, adam, self.device)
        stage = Stage(level.number, level.epochs, lambda step: section.gate_lr)
        rows = self._fit(stage, optimizer, trainer, gated, [ClampGates(gated)], place)
        found = {name: value.detach() for name, value in gated.gates.items()}
        distributed.agree("gates", files.digest(found))
        distributed.from_main(lambda: files.save_tensors(place.gates, found, {"source": self.initial_digest}))
        return Cut(model, cut.kept), trainer, rows

    def _train(self, level: Level, place: LevelDir, trainer: Trainer) -> list[Row]:
        params = self.params
        self.console.restart_table()
        distributed.agree(f"weights at level {level.number} start", files.digest(files.state_of(trainer.model)))
        optimizer = build_optimizer(trainer.model, params.optimizer, self.device)
        stage = Stage(level.number, level.epochs, self._rate(level, trainer.steps_per_epoch))
        extensions: list[Extension] = []
        if params.pruning.moment == "early" and level.number == 0:
            trigger = triggers.build(params.early, model=trainer.model, density=min(params.structured.keep))
            latest = params.early.latest.at(trainer.steps_per_epoch) if params.early.latest is not None else None
            extensions.append(StopAtTrigger(trainer.model, stage, trigger, trainer.steps_per_epoch, latest))
        return self._fit(stage, optimizer, trainer, trainer.model, extensions, place)

    def _fit(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        trainer: Trainer,
        model: nn.Module,
        extensions: list[Extension],
        place: LevelDir,
    ) -> list[Row]:
        # Nothing is masked: what is pruned is not there.
        held = sparsity.attach(model, optimizer, Masks({}))
        keeper = self._keeper(stage.level, place, model)
        if found := keeper.find():
            self._begin -= found.notes["seconds"]
        keeper.notes = lambda: {"seconds": time.perf_counter() - self._begin}
        if reason := self.stopping.poll().stop:
            raise Stopped(reason)
        with EpochsCsv(place.epochs if self.world.main else None, keeper.rows) as table:

            def on_epoch(row: Row) -> None:
                table.write(row)
                names = ("train_loss", "train_acc", "val_acc", "test_acc", "gates_mean", "images_per_second", "seconds")
                cells = [(name, number(row.get(name))) for name in names if row.get(name) is not None]
                self.console.row([("epoch", f"{row['epoch'] + 1}/{stage.epochs}"), ("lr", f"{row['lr']:.4g}"), *cells])

            return trainer.fit(stage, optimizer, held, extensions, on_epoch, keeper)

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
            check=self._lock.check,
        )

    def _rate(self, level: Level, per_epoch: int) -> Callable[[int], float]:
        """The learning rate as a function of the step; Scratch-B stretches the schedule, milestones included."""
        params = self.params
        if params.structured.scratch != "b" or level.density == 1.0:
            return rate_of(params, self.plan, level, per_epoch)
        epochs, total = params.training.epochs, params.training.epochs * per_epoch
        return lambda step: lr_at(step * epochs // level.epochs, params.schedule, params.optimizer.lr, total, per_epoch)

    # Pieces -------------------------------------------------------------------------------------------------------

    def _placed(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        if self.params.distributed.sync_batchnorm:
            model = synchronise_batchnorm(model, self.device)
        if self.params.training.channels_last:
            to_channels_last(model)
        return model

    def _trainer(self, model: nn.Module, task: ImageClassification, placed: bool = False) -> Trainer:
        return Trainer(
            model if placed else self._placed(model),
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

    def _tell(self, level: Level, cut: Cut) -> None:
        channels = self.channels
        macs = channels.channels.cost.macs(cut.kept.widths)
        share = ""
        if cut.chosen is not None:
            reached = cut.chosen.reached / cut.chosen.reference
            share = f"{reached:.4f} of the {self.params.structured.budget} kept ({level.density:g} asked for), "
        self.console.line(
            f"level {level.number}: {share}{macs / 1e6:.2f} of {channels.macs_dense / 1e6:.2f} M MACs, "
            f"{cut.kept.kept} of {cut.kept.total} channels"
        )

    def _row(self, level: Level, cut: Cut, rows: list[Row], final: Row, pruned: float | None) -> Row:
        channels, section = self.channels, self.params.structured
        model = cut.model
        weights = files.digest(files.state_of(model))
        distributed.agree(f"weights at level {level.number} end", weights)
        masks = cut.kept.masks(channels.searched, channels.channels.groups)
        row = self.record.level_row(level, Outcome(masks, rows, final, pruned, weights, masks.density, None, None))
        row |= {
            "target_density": masks.density,  # the share asked for is one of the budget, not of weights
            "macs_dense": channels.macs_dense,
            "macs": channels.channels.cost.macs(cut.kept.widths),
            "parameters": channels.channels.cost.parameters(cut.kept.widths),
            "kept_share": None if cut.chosen is None else cut.chosen.reached / cut.chosen.reference,
            "mask_digest": cut.kept.digest,
        }
        if cut.chosen is not None:
            row |= {"criterion": section.criterion, "allocation": section.scope, "pattern": "channels removed"}
            row |= {"rounds": section.rounds}
        size = max(1, min(32, self.params.training.batch_size // self.world.size))
        if any(p.requires_grad for p in model.parameters()):
            row |= measure(model, channels.input_shape, size, self.dtype)
        return row

    def _save(self, level: Level, place: LevelDir, cut: Cut, row: Row) -> None:
        files.save_weights(place.weights, cut.model, widths=cut.kept.digest)
        masks = cut.kept.masks(self.channels.searched, self.channels.channels.groups)
        write_layers_csv(place.layers, self.channels.searched, masks)
        if level.source is not None:
            before = reporting.read_row(self.dir.level(level.source).row)["weights_digest"]
            place.origin.write_text(before, encoding="utf-8")
        row["seconds"] = time.perf_counter() - self._begin
        write_json(place.row, row)
        reporting.rebuild(self.dir)
        if self.params.run.keep != "all":
            checkpoint.remove(place)
