"""The driver of structured runs: learn gates or train the whole network, take channels out, train what is left.

Every level has a network of its own, so it is built, wrapped and trained anew; files, records and the skipping of what
is done are those of the other runs. A level's network is in its widths.json and weights.safetensors:
`models.rebuild(widths, weights)` gives it back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from utils import data, files, reporting
from utils.data.order import Shard
from utils.feasibility import check_recipes, check_steps
from utils.level_channels import Cut, LevelChannels
from utils.masks import Masks
from utils.owned import own_level
from utils.params import Params
from utils.params.checks import check_ranks
from utils.params.plan import Level, level_plan
from utils.pruning.report import write_layers_csv
from utils.pruning.structured import ChannelGroup
from utils.record import Outcome, Record, Row, run_dir
from utils.structured_masks import SingleWeights
from utils.structured_stages import Stages, Trained, task_options
from utils.system import distributed
from utils.system.atomic import write_json
from utils.system.console import Console, number
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.system.locks import Lock
from utils.system.rundir import LevelDir, RunDir
from utils.system.stopping import Never
from utils.tasks.classification import ImageClassification
from utils.training import checkpoint, precision
from utils.training.measure import measure

MOST_TOLD = 3
"""Groups that stay whole whose reasons are told as a run starts."""


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
            task = ImageClassification(**task_options(params, self.loaders))  # type: ignore[arg-type]
            check_steps(params, self.plan, len(self.loaders.train) // training.accumulation)
            self.channels = LevelChannels(params, self.loaders, task, run_dir(params), world, device)
            spec, samples = self.loaders.spec, self.loaders.train.samples
            check_recipes(params, self.plan, self.channels.searched, Masks({}), spec, samples)
            self.singles = SingleWeights(params, self.loaders, task, self.channels, world, device)
            self.stages = Stages(params, self.plan, self.loaders, self.channels, world, device, console, self.stopping)
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
            self.console.line(described(self.channels.channels.groups))
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
        """Train gates, or take channels out and train what is left; then record it."""
        self.stages.begin(lock)
        place = self.dir.level(level.number)
        if level.work == "gates":
            trained = self.stages.gates(level, place, self.initial_digest)
        elif level.work == "tick":
            trained = self.stages.tick(level, place)
        else:
            cut = self._cut(level, place)
            self._tell(level, cut)
            trained = self.stages.tock(level, place, cut) if level.work == "tock" else self._weights(level, place, cut)
        final = trained.rows[-1] if trained.rows else trained.trainer.evaluate_all()
        row = self._row(level, trained, final)
        distributed.from_main(lock.check)
        distributed.from_main(functools.partial(self._save, level, place, trained, row))
        self.console.row(
            [
                ("level", str(level.number)),
                ("macs", f"{row['macs'] / 1e6:.2f} M"),
                ("val_acc", number(row["val_acc"])),
                ("test_acc", number(row["final_test_acc"])),
                ("seconds", f"{self.stages.seconds():.1f}"),
            ]
        )
        self.console.restart_table()

    def _cut(self, level: Level, place: LevelDir) -> Cut:
        """The network the level trains, with the weights it starts from."""
        if level.work == "train":
            return self.channels.whole() if level.source is None else self.channels.of_level(level.source)
        gates: dict[str, torch.Tensor] = {}
        if level.source is not None and self.params.structured.criterion == "gates":
            path = self.dir.level(level.source).gates
            if not distributed.exists(path):
                raise UserError(
                    f"{path}: missing, level {level.number} prunes by it; remove {path.parent.name} and run again"
                )
            gates = files.load_tensors(path)[0]
        fresh = level.source is None or self.params.pruning.moment == "init"
        source = self.channels.whole() if fresh else self.channels.of_level(level.source or 0)
        return self.channels.cut(level, place, source, gates, self.console)

    def _weights(self, level: Level, place: LevelDir, cut: Cut) -> Trained:
        """Train the level's network, within masks where single weights are pruned too."""
        if level.work == "prune":
            cut = self.singles.prune(cut, self.console)
        return self.stages.weights(level, place, cut)

    # Pieces -------------------------------------------------------------------------------------------------------

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

    def _row(self, level: Level, trained: Trained, final: Row) -> Row:
        channels, section, cut = self.channels, self.params.structured, trained.cut
        model = cut.model
        weights = files.digest(files.state_of(model))
        distributed.agree(f"weights at level {level.number} end", weights)
        masks = self.singles.of_searched(cut)
        effective = self.singles.effective(cut, masks)
        row = self.record.level_row(
            level, Outcome(masks, trained.rows, final, trained.pruned, weights, effective, None, None)
        )
        row |= {
            "target_density": masks.density,  # the share asked for is one of the budget, not of weights
            "macs_dense": channels.macs_dense,
            **self.singles.costs(cut),
            "kept_share": None if cut.chosen is None else cut.chosen.reached / cut.chosen.reference,
            "mask_digest": cut.digest,
        }
        if cut.chosen is not None:
            row |= {"criterion": section.criterion, "allocation": section.scope, "pattern": "channels removed"}
            row |= {"rounds": section.rounds}
            if cut.masks is not None:
                then = self.params.pruning
                row |= {
                    name: f"{row[name]}, {value}"
                    for name, value in (
                        ("criterion", then.criterion),
                        ("allocation", then.allocation),
                        ("pattern", then.pattern),
                    )
                }
        size = max(1, min(32, self.params.training.batch_size // self.world.size))
        if any(p.requires_grad for p in model.parameters()):
            row |= measure(model, channels.input_shape, size, self.dtype)
        return row

    def _save(self, level: Level, place: LevelDir, trained: Trained, row: Row) -> None:
        cut = trained.cut
        if cut.chosen is None:
            self.channels.note(level, place, cut)
        digests = {"widths": cut.kept.digest, "mask_digest": cut.digest}
        files.save_weights(place.weights, cut.model, **digests)
        if cut.masks is not None:
            cut.masks.save(place.mask)
        if trained.average is not None:
            with trained.average.swapped():
                files.save_weights(place.average, cut.model, **digests)
        write_layers_csv(place.layers, self.channels.searched, self.singles.of_searched(cut))
        if level.source is not None:
            before = reporting.read_row(self.dir.level(level.source).row)["weights_digest"]
            place.origin.write_text(before, encoding="utf-8")
        row["seconds"] = self.stages.seconds()
        write_json(place.row, row)
        reporting.rebuild(self.dir)
        if self.params.run.keep != "all":
            checkpoint.remove(place)


def described(groups: Sequence[ChannelGroup]) -> str:
    """How many groups of channels may be pruned, and why the others stay whole, in one line."""
    whole = [group for group in groups if group.protected is not None]
    text = f"channels: {len(groups) - len(whole)} groups may be pruned, {len(whole)} stay whole"
    why = "; ".join(f"{group.name}: {group.protected}" for group in whole[:MOST_TOLD])
    return f"{text} ({why}{'; ...' if len(whole) > MOST_TOLD else ''})" if whole else text
