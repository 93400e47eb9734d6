"""All parameters of a run: one frozen dataclass per section, no torch, no fastargs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from utils.params.data import Data
from utils.params.distributed import Distributed
from utils.params.dynamic import Dynamic
from utils.params.early import Early
from utils.params.graph import Graph
from utils.params.levels import Levels
from utils.params.model import Model
from utils.params.optimizer import Optimizer
from utils.params.pruning import Pruning
from utils.params.recipe import Recipe
from utils.params.run import Run
from utils.params.schedule import Schedule
from utils.params.step import Step
from utils.params.structured import Structured
from utils.params.training import Training


@dataclass(frozen=True)
class Params:
    """Every section of a config. A new section is a field here and a file beside this one.

    A field whose dataclass holds sections itself gives `recipe.soft`, `recipe.ghost` and so on.
    """

    run: Run = dataclasses.field(default_factory=Run)
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    training: Training = dataclasses.field(default_factory=Training)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    pruning: Pruning = dataclasses.field(default_factory=Pruning)
    structured: Structured = dataclasses.field(default_factory=Structured)
    graph: Graph = dataclasses.field(default_factory=Graph)
    early: Early = dataclasses.field(default_factory=Early)
    dynamic: Dynamic = dataclasses.field(default_factory=Dynamic)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    levels: Levels = dataclasses.field(default_factory=Levels)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)


__all__ = [
    "Data",
    "Distributed",
    "Dynamic",
    "Early",
    "Graph",
    "Levels",
    "Model",
    "Optimizer",
    "Params",
    "Pruning",
    "Recipe",
    "Run",
    "Schedule",
    "Step",
    "Structured",
    "Training",
]
