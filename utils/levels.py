"""The level driver: prune, rewind, train, record, level after level.

Every stage writes its result atomically and is skipped when the result is there, so running the same command again
resumes, and a process that runs one level finds what the level before it left. Rank 0 decides what is there and
writes; all ranks compute the same masks and weights and compare their digests.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from utils import data, files, reporting
from utils.data.order import Shard
from utils.data.spec import DataSpec
from utils.feasibility import build_model, check_pruning, check_steps
from utils.level_extensions import LevelExtensions, assemble
from utils.level_masks import LevelMasks, changes_masks, source_of
from utils.masks import Masks
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
from utils.system.rundir import LevelDir, RunDir
from utils.tasks.classification import ImageClassification
from utils.training.extension import Extension
from utils.training.optimizers import build_optimizer
from utils.training.parallel import synchronise_batchnorm, to_channels_last
from utils.training.trainer import Row, Stage, Trainer


class Driver:
    """One run: its directory, its data and model, and the levels of its plan."""

    def __init__(self, params: Params, world: World, device: torch.device, console: Console) -> None:
        """Builds everything a level needs; writes nothing. Raises UserError for input that cannot work."""
        check_ranks(params, world.size)
        self.params, self.world, self.device, self.console = params, world, device, console
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
            )
            self.masks = LevelMasks(params, self.model, self.task, self.loaders, run_dir(params), world, console)
            self.sparsity = self.masks.sparsity
            self.rewinding = Rewinding(params, self.trainer, run_dir(params))
            check_steps(params, self.plan, self.trainer.steps_per_epoch)
            check_pruning(self.masks.harness, params, self.plan, self.model, self.masks.start, self.masks.starter)
            self.record = Record(params, self.loaders, self.trainer.dtype, world, device)
        except BaseException:
            self.loaders.close()
            raise

    @property
    def dir(self) -> RunDir:
        """The run's directory."""
        return self.record.dir

    def run(self) -> RunDir:
        """Run every level of the plan that is not done yet, or `levels.only` alone."""
        try:
            wanted = self._wanted()
            distributed.from_main(self.record.start)
            for level in wanted:
                if distributed.from_main(functools.partial(self._done, level)):
                    self.console.line(f"level {level.number}: done already")
                else:
                    self._level(level)
            distributed.from_main(functools.partial(self.record.finish, [level.number for level in self.plan]))
        finally:
            self.loaders.close()
        return self.dir

    def _done(self, level: Level) -> bool:
        """Whether the level's row is there and was made from the weights its source has now. Rank 0 looks."""
        place = self.dir.level(level.number)
        if not place.row.exists():
            return False
        if level.source is None:
            source = self.initial_digest
        else:
            source = reporting.read_row(self.dir.level(level.source).row)["weights_digest"]
        if place.mask.exists() and source_of(place.mask) == source:
            return True
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

    def _level(self, level: Level) -> None:
        """Prune, rewind, train and record one level."""
        begin = time.perf_counter()
        place = self.dir.level(level.number)
        source = self._source_weights(level)
        masks = self.masks.begin(level, place, source)
        self.console.line(
            f"level {level.number}: density {masks.density:.4f} ({masks.kept:,} of {masks.total:,} weights kept)"
        )
        self.console.restart_table()
        pruned = self._pruned_accuracy(level, source, masks)
        optimizer = build_optimizer(self.model, self.params.optimizer, self.device)
        # The control trains other weights in the masks found; the dense level that finds them begins as without it.
        finds = level.source is None and self.params.pruning.moment not in SINGLE
        first = self.initial if finds else self.first
        start = self.rewinding.restore(level, first, source, optimizer)
        self.sparsity.watch(optimizer)
        self.sparsity.set(masks)
        self._agree(f"level {level.number} start")
        stage = Stage(level.number, level.epochs, self._rate(level), start, self.rewinding.marks(level, optimizer))
        extensions = assemble(self.params, level, stage, self.trainer, self.masks, masks)
        rows = self._train(stage, optimizer, extensions.all, place)
        digest = self._agree(f"level {level.number} end")
        final = rows[-1] if rows else self.trainer.evaluate_all(extensions.all)
        masks = self.sparsity.masks
        effective = self.masks.effective(masks).density
        at_step = extensions.pruned_at_step
        outcome = Outcome(masks, rows, final, pruned, digest, effective, self.masks.rounds, at_step)
        row = self.record.level_row(level, outcome) | self.masks.costs(masks)
        distributed.from_main(functools.partial(self._save, place, extensions, row, begin))
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

    # Stages -------------------------------------------------------------------------------------------------------

    def _source_weights(self, level: Level) -> dict[str, torch.Tensor]:
        if level.source is None:
            return self.initial
        path = self.dir.level(level.source).weights
        if not distributed.exists(path):
            raise UserError(f"{path}: missing, level {level.number} prunes it; run level {level.source} again")
        return files.load_weights(path)

    def _pruned_accuracy(self, level: Level, source: dict[str, torch.Tensor], masks: Masks) -> float | None:
        """Test accuracy right after pruning, before rewinding and training; None where nothing trained was pruned."""
        if level.source is None:
            return None
        files.put_weights(self.model, source)
        masks.apply_(self.model)
        return float(self.trainer.evaluate(self.loaders.test)["acc"])

    def _train(
        self, stage: Stage, optimizer: torch.optim.Optimizer, extensions: list[Extension], place: LevelDir
    ) -> list[Row]:
        with EpochsCsv(place.epochs if self.world.main else None) as table:

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

            return self.trainer.fit(stage, optimizer, self.sparsity, extensions, on_epoch)

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

    def _agree(self, moment: str) -> str:
        """All ranks hold the same masks and weights, and nothing pruned is alive. Returns the weights' digest."""
        digest = files.digest(files.state_of(self.model))
        distributed.agree(f"masks at {moment}", self.sparsity.masks.digest)
        distributed.agree(f"weights at {moment}", digest)
        if violations := self.sparsity.violations():
            raise RuntimeError(f"{moment}: pruned weights of {violations[0]!r} are not 0.0")
        return digest


def _copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
