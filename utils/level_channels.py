"""The networks of a structured run: the stock one, the one that is pruned, and what each level leaves of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from utils import files, models
from utils.data import Loaders
from utils.feasibility import build_model
from utils.masks import Masks
from utils.models.widths import WidthFile, Widths, widths_between
from utils.params import Params
from utils.params.plan import Level
from utils.pruning.structured import ChannelMask, Channels, Chosen, Evidence, Limits, shrink, shrink_masks
from utils.pruning.structured.budget import choose_units
from utils.pruning.structured.expand import expanded_units, widths_of
from utils.pruning.structured.learn import checked_gates
from utils.pruning.structured.scores import channel_criterion, score_units
from utils.system import distributed
from utils.system.console import Console
from utils.system.distributed import World
from utils.system.errors import UserError
from utils.system.rundir import LevelDir, RunDir
from utils.tasks.classification import ImageClassification

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Cut:
    """What a level trains: its network (on the CPU), which channels of the pruned network it holds, and the budget.

    masks: of single weights of `model`; None: all live.
    """

    model: nn.Module
    kept: ChannelMask
    chosen: Chosen | None = None
    masks: Masks | None = None

    @property
    def digest(self) -> str:
        """Of the masks of single weights where there are any, else of the channels kept."""
        return self.kept.digest if self.masks is None else self.masks.digest


class LevelChannels:
    """Builds the network of every level. All ranks compute the same; rank 0 writes width files."""

    def __init__(
        self,
        params: Params,
        loaders: Loaders,
        task: ImageClassification,
        run: RunDir,
        world: World,
        device: torch.device,
    ) -> None:
        """device: where the loaders put images. Raises UserError for a network that cannot be made smaller."""
        self.params, self.loaders, self.task, self.run, self.world = params, loaders, task, run, world
        self.device = device
        section, spec = params.structured, loaders.spec
        side = spec.image_size
        self.input_shape = (3, side, side)
        self.stock = build_model(params, spec, params.model.pretrained)
        follow = functools.partial(
            Channels.of,
            input_shape=self.input_shape,
            name=params.model.name,
            exclude=section.exclude,
            coupled=section.coupled,
        )
        whole = follow(self.stock)
        self.macs_dense, self.reference = whole.cost.macs(), _reference(section.budget, whole)
        self.searched, self.channels = self.stock, whole
        if section.expansion is not None or section.multiplier != 1.0:
            units = expanded_units(self.stock, whole.groups, section.expansion, section.multiplier)
            self.searched = self._build(widths_of(self.stock, whole.groups, units))
            self.channels = follow(self.searched)
        self._follow = follow
        self.initial = {name: tensor.detach().clone() for name, tensor in files.state_of(self.searched).items()}

    def _build(self, widths: Widths) -> nn.Module:
        params, spec = self.params, self.loaders.spec
        return models.build(
            params.model.name, spec.classes, image_size=spec.image_size, seed=params.run.seed, widths=widths
        )

    def whole(self) -> Cut:
        """The network that is pruned, with its initial weights."""
        model = copy.deepcopy(self.searched)
        files.put_weights(model, self.initial)
        return Cut(model, ChannelMask.dense(self.channels.groups))

    def of_level(self, level: int) -> Cut:
        """The network level `level` trained, with the weights it ended with.

        Raises UserError where the mask these were trained in is missing, or another.
        """
        place = self.run.level(level)
        cut = self.whole()
        if distributed.exists(place.widths):
            stored = WidthFile.load(place.widths)
            cut = Cut(self._build(stored.widths), _units(stored, "channels", self.channels))
        files.put_weights(cut.model, files.load_weights(place.weights), str(place.weights))
        if distributed.exists(place.mask):
            cut = replace(cut, masks=Masks.load(place.mask, cut.model))
        if files.load_metadata(place.weights).get("mask_digest", cut.digest) != cut.digest:
            odd = "missing" if cut.masks is None else "another one"
            raise UserError(
                f"{place.mask}: {odd}; level {level} was trained in the mask its weights name: put it back, or remove "
                f"{place.path.name} and run again"
            )
        return cut

    def follow(self, cut: Cut) -> Channels:
        """The channels of the network of `cut`."""
        return self.channels if cut.kept.kept == cut.kept.total else self._follow(cut.model)

    def cut(self, level: Level, place: LevelDir, source: Cut, gates: Weights, console: Console) -> Cut:
        """The network of `level`: `source` without what its share of the budget does not pay for.

        Scores and the search are skipped where the level's width file is there and made from these weights.
        """
        channels = self.follow(source)
        digest = files.digest({**files.state_of(source.model), **{f"gate {name}": g for name, g in gates.items()}})
        if distributed.from_main(lambda: place.widths.exists() and _facts(place).get("source") == digest):
            mask = _units(WidthFile.load(place.widths), "units", channels)
            chosen = Chosen(mask, *(int(_facts(place)[key]) for key in ("reached", "allowed", "reference")))
        else:
            chosen = self._choose(level.density, channels, source.model, gates)
        smaller = shrink(source.model, channels.groups, chosen.mask)
        channels.check_cost(smaller, chosen.mask)
        kept = _composed(source.kept, chosen.mask)
        widths = widths_between(self.stock, smaller)
        distributed.agree(f"channels of level {level.number}", chosen.mask.digest)
        distributed.from_main(functools.partial(self._save, level, place, widths, kept, chosen, digest))
        if self.params.structured.fresh:
            return Cut(self._build(widths), kept, chosen)
        masks = source.masks and shrink_masks(source.masks, chosen.mask.keep(channels.groups))
        return Cut(smaller, kept, chosen, masks)

    def note(self, level: Level, place: LevelDir, cut: Cut) -> None:
        """Write the width file of a level that takes nothing out. Rank 0 calls it."""
        self._save(level, place, widths_between(self.stock, cut.model), cut.kept, None, "")

    def _choose(self, keep: float, channels: Channels, model: nn.Module, gates: Weights) -> Chosen:
        """Rounds of scoring and choosing, at budgets that fall geometrically from what the network has."""
        section, seed = self.params.structured, self.params.run.seed
        assert section.budget is not None
        begin = _reference(section.budget, channels) / self.reference
        mask = ChannelMask.dense(channels.groups)
        chosen = None
        for number in range(1, section.rounds + 1):
            share = keep if number == section.rounds else begin * (keep / begin) ** (number / section.rounds)
            chosen = choose_units(
                channels.groups,
                self._scores(channels, model, mask, gates),
                channels.cost,
                budget=section.budget,
                keep=share,
                reference=self.reference,
                scope=section.scope,
                limits=Limits(section.min_width, section.round_to),
                seed=seed,
            )
            mask = chosen.mask
        assert chosen is not None
        return chosen

    def _scores(
        self, channels: Channels, model: nn.Module, mask: ChannelMask, gates: Weights
    ) -> dict[str, torch.Tensor]:
        """Scores of the network with only the units of `mask`; those gone before rank below all others."""
        section = self.params.structured
        held = model
        if mask.kept < mask.total:
            held = copy.deepcopy(model)
            mask.apply_(held, channels.groups)
        own = checked_gates(gates, channels.open, "gates") if gates else {}
        evidence = Evidence(loss=self.task.scoring_loss, input_shape=self.input_shape, gates=own)
        if channel_criterion.entry(section.criterion).traits["reads"] != "train":
            scores = score_units(section.criterion, held, channels.groups, evidence, self.params.run.seed)
        else:
            scores = self._scored_on_data(channels, held, evidence)
        return {name: score.masked_fill(~mask[name], -torch.inf) for name, score in scores.items()}

    def _scored_on_data(self, channels: Channels, model: nn.Module, evidence: Evidence) -> dict[str, torch.Tensor]:
        pruning = self.params.pruning
        per_class = None if pruning.batches is not None else pruning.samples_per_class or 10
        batches = self.loaders.scoring(
            per_class=per_class,
            batches=pruning.batches,
            batch_size=pruning.batch_size,
            rank=self.world.rank,
            ranks=self.world.size,
        )
        try:
            moved = copy.deepcopy(model).to(self.device)
            found = Evidence(batches, evidence.loss, evidence.input_shape, evidence.gates)
            return score_units(self.params.structured.criterion, moved, channels.groups, found, self.params.run.seed)
        finally:
            batches.close()

    def _save(
        self, level: Level, place: LevelDir, widths: Widths, kept: ChannelMask, chosen: Chosen | None, source: str
    ) -> None:
        params = self.params
        facts: dict[str, Any] = {
            "budget": params.structured.budget,
            "keep": level.density,
            "macs": self.channels.cost.macs(kept.widths),
            "macs_dense": self.macs_dense,
            "parameters": self.channels.cost.parameters(kept.widths),
            "criterion": params.structured.criterion,
            "scope": params.structured.scope,
            "seed": params.run.seed,
            "expansion": params.structured.expansion,
            "multiplier": params.structured.multiplier,
            "source": source,
            "widths": kept.widths,
            "channels": {name: torch.nonzero(units).flatten().tolist() for name, units in kept.items()},
        }
        if chosen is not None:
            facts |= {"reached": chosen.reached, "allowed": chosen.allowed, "reference": chosen.reference}
            facts["units"] = {name: torch.nonzero(units).flatten().tolist() for name, units in chosen.mask.items()}
        spec = self.loaders.spec
        WidthFile(params.model.name, spec.classes, spec.image_size, widths, facts).save(place.widths)


def _reference(budget: str | None, channels: Channels) -> int:
    """What a share of the budget refers to."""
    if budget == "macs":
        return channels.cost.macs()
    return channels.cost.parameters() if budget == "parameters" else sum(group.size for group in channels.open)


def _facts(place: LevelDir) -> Mapping[str, Any]:
    return WidthFile.load(place.widths).facts


def _units(stored: WidthFile, key: str, channels: Channels) -> ChannelMask:
    """Units by index in a width file as a mask of these groups."""
    found = {}
    for group in channels.groups:
        units = torch.zeros(group.size, dtype=torch.bool)
        try:
            units[torch.tensor(stored.facts[key][group.name], dtype=torch.int64)] = True
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"widths: {key} of {group.name!r} are not this network's; remove the level's folder"
            ) from error
        found[group.name] = units
    return ChannelMask(found)


def _composed(before: ChannelMask, after: ChannelMask) -> ChannelMask:
    """Which units of the first network are left when `after` is taken out of what `before` leaves of it."""
    found = {}
    for name, units in before.items():
        left = torch.zeros_like(units)
        left[torch.nonzero(units).flatten()[after[name]]] = True
        found[name] = left
    return ChannelMask(found)
