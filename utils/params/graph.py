"""Section `graph`: masks that are random bipartite graphs of channels (expanders), chosen without scores."""

from __future__ import annotations

from dataclasses import dataclass

from utils.params.field import param


@dataclass(frozen=True)
class Graph:
    """Layer graphs: one vertex per input and output channel, one edge per kept kernel."""

    kind: str | None = param(
        None, "none: masks come from pruning.criterion; else the graph of every layer", kind="graph", empty="none"
    )
    degree: int | None = param(
        None, "edges per vertex, the same in all layers; instead of pruning.density", low=1, empty="none"
    )
    side: str = param("in", "xnet: the side whose channels all have the degree", choices=("in", "out", "smaller"))
    form: str = param(
        "simple",
        "rreg: exactly biregular, or stub matching with parallel edges collapsed, best of `tries` (paper)",
        choices=("simple", "paper"),
    )
    tries: int = param(100, "graphs drawn by rreg's paper form; the one that expands most is kept", low=1)
