"""The level driver: prune, rewind, train, record, level after level.

Every stage writes its result atomically and is skipped when the result is there, so running the same command again
resumes, and a process that runs one level finds what the level before it left. Rank 0 decides what is there and
writes; all ranks compute the same masks and weights and compare their digests.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable

import torch

from utils import data, files, reporting
from utils.data.order import Shard
from utils.data.spec import DataSpec
from utils.feasibility import build_model, check_pruning, check_recipes, check_steps
from utils.level_extensions import LevelExtensions, assemble
from utils.level_masks import LevelMasks, changes_masks, source_of
from utils.masks import Masks
from utils.owned import own_level
from utils.params import Params
from utils.params.checks import check_ranks
from utils.params.plan import SINGLE, Level, level_plan
from utils.pruning.controls import fresh_seed
from utils.record import EpochsCsv, Outcome, Record, run_dir
from utils.rewinding import Rewinding, rate_of
from utils.system import distributed
from utils.system.atomic import write_json
from utils.system.console import Console, number
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.system.locks import Lock
from utils.system.rundir import LevelDir, RunDir
from utils.system.stopping import Never, Stopped
from utils.tasks.classification import ImageClassification
from utils.training import checkpoint
from utils.training.extension import Extension
from utils.training.optimizers import build_optimizer
from utils.training.parallel import synchronise_batchnorm, to_channels_last
from utils.training.trainer import Row, Stage, Trainer


class Driver:
    """One run: its directory, its data and model, and the levels of its plan."""

    def __init__(
        self,
        params: Params,
        world: World,
        device: torch.device,
        console: Console,
        stopping: Never | None = None,
    ) -> None:
        """Builds everything a level needs; writes nothing. Raises UserError for input that cannot work.

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
            spec = self.loaders.spec
            self.model = build_model(params, spec, params.model.pretrained).to(device)
            if params.distributed.sync_batchnorm:
                self.model = synchronise_batchnorm(self.model, device)
            if training.channels_last:
                to_channels_last(self.model)
            self.initial = _copy(files.state_of(self.model))
            self.initial_digest = files.digest(self.initial)
            distributed.agree("initial weights", self.initial_digest)
            self.first = self._first_weights(spec)
            self.task = ImageClassification(
                spec.classes, training.label_smoothing, params.data.mixup, params.data.cutmix, training.test_flip
            )
            self.trainer = Trainer(
                self.model,
                self.task,
                self.loaders,
                training,
                params.distributed,
                seed=params.run.seed,
                world=world,
                device=device,
                console=console,
                stopping=self.stopping,
            )
            self.masks = LevelMasks(params, self.model, self.task, self.loaders, run_dir(params), world, console)
            self.sparsity = self.masks.sparsity
            self.rewinding = Rewinding(params, self.trainer, run_dir(params))
            check_steps(params, self.plan, self.trainer.steps_per_epoch)
            check_pruning(self.masks.harness, params, self.plan, self.model, self.masks.start, self.masks.starter)
            check_recipes(params, self.plan, self.model, self.masks.start, spec, self.loaders.train.samples)
            self.record = Record(params, self.loaders, self.trainer.dtype, world, device)
        except BaseException:
            self.loaders.close()
            raise

    @property
    def dir(self) -> RunDir:
        """The run's directory."""
        return self.record.dir

    def run(self) -> RunDir:
        """Run every level of the plan that is not done yet, or `levels.only` alone.

        Raises Preempted, on all ranks and with the state stored, when a stop was asked for; Busy when another process
        is at work on a level.
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

    def _done(self, level: Level, ours: bool) -> bool:
        """Whether the level's row is there and was made from the weights its source has now. Rank 0 looks.

        ours: the level is locked by this process; a row made from other weights is then removed.
        """
        place = self.dir.level(level.number)
        if not place.row.exists():
            return False
        if level.source is None:
            source = self.initial_digest
        else:
            source = reporting.read_row(self.dir.level(level.source).row)["weights_digest"]
        if place.mask.exists() and source_of(place.mask) == source:
            if self.params.run.keep != "all":
                checkpoint.remove(place)
            if not ours:
                Lock(place.path, "").tidy()
            return True
        if ours:
            self.console.line(f"level {level.number}: was made from other weights, running it again")
            place.row.unlink()
        return False

    def _wanted(self) -> list[Level]:
        only = self.params.levels.only
        if only is None:
            return self.plan
        if only >= len(self.plan):
            raise UserError(f"levels.only={only}: the plan has levels 0 to {len(self.plan) - 1}")
        level = self.plan[only]
        if level.source is not None and not distributed.exists(self.dir.level(level.source).row):
            raise UserError(
                f"levels.only={only}: level {level.source} it starts from is not done in {self.dir.path}; run it first"
            )
        return [level]

    def _level(self, level: Level, lock: Lock) -> None:
        """Prune, rewind, train and record one level."""
        begin, place = time.perf_counter(), self.dir.level(level.number)
        source = self._source_weights(level)
        masks = self.masks.begin(level, place, source)
        self.console.line(
            f"level {level.number}: density {masks.density:.4f} ({masks.kept:,} of {masks.total:,} weights kept)"
        )
        self.console.restart_table()
        keeper = self._keeper(level, place, masks, lock)
        found = keeper.find()
        pruned = found.notes["pruned"] if found else self._pruned_accuracy(level, source, masks)
        begin -= found.notes["seconds"] if found else 0.0
        optimizer = build_optimizer(self.model, self.params.optimizer, self.device)
        # The control trains other weights in the masks found; the dense level that finds them begins as without it.
        finds = level.source is None and self.params.pruning.moment not in SINGLE
        first = self.initial if finds else self.first
        start = self.rewinding.restore(level, first, source, optimizer)
        self.sparsity.watch(optimizer)
        self.sparsity.set(masks)
        self._agree(f"level {level.number} start", self._weights_digest)
        stage = Stage(level.number, level.epochs, self._rate(level), start, self.rewinding.marks(level, optimizer))
        extensions = assemble(self.params, level, stage, self.trainer, self.masks, masks, optimizer, found is None)
        if found:
            self.masks.load_notes(found.notes["masks"])
        keeper.notes = lambda: {
            "pruned": pruned,
            "seconds": time.perf_counter() - begin,
            "masks": self.masks.notes(),
        }
        if reason := self.stopping.poll().stop:
            raise Stopped(reason)
        rows = self._train(stage, optimizer, extensions.all, place, keeper)
        extensions.close()
        digest = self._weights_digest()
        self._agree(f"level {level.number} end", digest)
        final = rows[-1] if rows else self.trainer.evaluate_all(extensions.all)
        masks = self.sparsity.masks
        effective = self.masks.effective(masks).density
        at_step = extensions.pruned_at_step
        outcome = Outcome(masks, rows, final, pruned, digest, effective, self.masks.rounds, at_step)
        row = self.record.level_row(level, outcome) | self.masks.costs(masks)
        distributed.from_main(lock.check)
        distributed.from_main(functools.partial(self._save, place, extensions, row, begin))
        distributed.from_main(keeper.remove)
        self.console.row(
            [
                ("level", str(level.number)),
                ("density", f"{masks.density:.4f}"),
                ("val_acc", number(row["val_acc"])),
                ("test_acc", number(row["final_test_acc"])),
                ("seconds", f"{time.perf_counter() - begin:.1f}"),
            ]
        )
        self.console.restart_table()

    def _keeper(self, level: Level, place: LevelDir, masks: Masks, lock: Lock) -> checkpoint.Checkpoints:
        """Stores the state inside the level, for a process that begins it with the same weights and masks."""
        beginning = f"{self.initial_digest} {self.masks.source_digest} {masks.digest}"
        return checkpoint.Checkpoints(
            place,
            self.params.run,
            self.model,
            level=level.number,
            key=hashlib.sha256(beginning.encode()).hexdigest(),
            world=self.world,
            console=self.console,
            check=lock.check,
        )

    # Stages -------------------------------------------------------------------------------------------------------

    def _source_weights(self, level: Level) -> dict[str, torch.Tensor]:
        if level.source is None:
            return self.initial
        path = self.dir.level(level.source).weights
        if not distributed.exists(path):
            raise UserError(f"{path}: missing, level {level.number} prunes it; run level {level.source} again")
        return files.load_weights(path, self.model)

    def _pruned_accuracy(self, level: Level, source: dict[str, torch.Tensor], masks: Masks) -> float | None:
        """Test accuracy right after pruning, before rewinding and training; None where nothing trained was pruned."""
        if level.source is None:
            return None
        files.put_weights(self.model, source)
        masks.apply_(self.model)
        return float(self.trainer.evaluate(self.loaders.test)["acc"])

    def _train(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        extensions: list[Extension],
        place: LevelDir,
        keeper: checkpoint.Checkpoints,
    ) -> list[Row]:
        # Rows of epochs after the checkpoint are cut off: they come again.
        with EpochsCsv(place.epochs if self.world.main else None, keeper.rows) as table:

            def on_epoch(row: Row) -> None:
                table.write(row)
                self.console.row(
                    [
                        ("epoch", f"{row['epoch'] + 1}/{stage.epochs}"),
                        ("lr", f"{row['lr']:.4g}"),
                        ("train_loss", f"{row['train_loss']:.4f}"),
                        ("train_acc", f"{row['train_acc']:.2f}"),
                        ("val_acc", number(row.get("val_acc"))),
                        ("test_acc", number(row.get("test_acc"))),
                        ("images/s", f"{row['images_per_second']:.0f}"),
                        ("wait", f"{row['data_wait']:.0%}"),
                        ("seconds", f"{row['seconds']:.1f}"),
                    ]
                )

            return self.trainer.fit(stage, optimizer, self.sparsity, extensions, on_epoch, keeper)

    def _save(self, place: LevelDir, extensions: LevelExtensions, row: Row, begin: float) -> None:
        files.save_weights(place.weights, self.model, mask_digest=row["mask_digest"])
        if extensions.average is not None:
            with extensions.average.swapped():
                files.save_weights(place.average, self.model, mask_digest=row["mask_digest"])
        if changes_masks(self.params):
            masks = self.sparsity.masks
            self.masks.write_layers(place, masks)
            if extensions.pruned_at_step is not None:
                self.masks.write_rounds(place)
            masks.save(place.mask, source=source_of(place.start_mask) or "")
        row["seconds"] = time.perf_counter() - begin
        write_json(place.row, row)
        reporting.rebuild(self.dir)

    # Pieces -------------------------------------------------------------------------------------------------------

    def _rate(self, level: Level) -> Callable[[int], float]:
        """The level's learning rate as a function of the step."""
        return rate_of(self.params, self.plan, level, self.trainer.steps_per_epoch)

    def _first_weights(self, spec: DataSpec) -> dict[str, torch.Tensor]:
        """What levels that start from initial weights train: these, or fresh ones with the same masks (a control)."""
        if self.params.pruning.control != "reinitialise":
            return self.initial
        seed = fresh_seed(self.params.run.seed)
        fresh = build_model(self.params, spec, self.params.model.pretrained, seed)
        return _copy(files.state_of(fresh))

    def _weights_digest(self) -> str:
        return files.digest(files.state_of(self.model))

    def _agree(self, moment: str, weights: str | Callable[[], str]) -> None:
        """All ranks hold the same masks and weights (digest `weights`), and nothing pruned is alive."""
        distributed.agree(f"masks at {moment}", self.sparsity.masks.digest)
        distributed.agree(f"weights at {moment}", weights)
        if violations := self.sparsity.violations():
            raise RuntimeError(f"{moment}: pruned weights of {violations[0]!r} are not 0.0")


def _copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
