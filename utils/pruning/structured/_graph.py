"""The one place that knows torch-pruning: its dependency graph, as plain names and indices.

torch-pruning (Fang et al. 2023, "DepGraph") follows the autograd graph of one forward pass and says which channels of
which layers must go together. Ranking, masking, removal and counting are not its business here.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from utils.system.errors import UserError

OUT, IN, PARAMETER = "out", "in", "parameter"


@dataclass(frozen=True, eq=False)
class Link:
    """Channel `root[i]` of the layer a group starts from is also channel `index[i]` of `name`.

    name      a module, or a bare parameter that belongs to no known layer
    side      `out` (rows and norms), `in` (columns) or `parameter`, whose channels lie along `dim`
    """

    name: str
    side: str
    index: np.ndarray
    root: np.ndarray
    dim: int = 0


@dataclass(frozen=True, eq=False)
class Coupled:
    """What hangs on the output channels of layer `root`: all of it, in the order the graph was walked.

    output: whether they reach the output of the model
    """

    root: str
    links: tuple[Link, ...]
    output: bool


def trace(model: nn.Module, example: torch.Tensor) -> list[Coupled]:
    """The coupled channels of every convolution and linear layer; each layer is in one entry. `model` stays as it is.

    example: one input batch. Raises UserError with torch-pruning's reason for a model that its graph cannot hold.
    """
    import torch_pruning

    copied = copy.deepcopy(model).eval().requires_grad_(True)
    graph = torch_pruning.DependencyGraph()
    try:
        with _quiet(), torch.enable_grad():
            graph.build_dependency(copied, example_inputs=example, verbose=False)
            return [_coupled(graph, group) for group in graph.get_all_groups()]
    except Exception as error:  # it fails in as many ways as there are networks
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"its channels cannot be followed by torch-pruning's graph ({reason})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _coupled(graph: object, group: object) -> Coupled:
    links, output, root = [], False, ""
    names, parameters = graph._module2name, graph._param_to_name  # type: ignore[attr-defined]
    for item in group:  # type: ignore[attr-defined]
        target = item.dep.target
        side, name, dim = OUT, names.get(target.module), 0
        if isinstance(target.module, nn.Parameter):
            side, name, dim = PARAMETER, parameters[target.module], int(target.pruning_dim)
        elif not graph.is_out_channel_pruning_fn(item.dep.handler):  # type: ignore[attr-defined]
            side = IN
        if side != IN and not target.outputs:  # nothing takes what it makes
            output = True
        if name is None:
            continue  # an operation without weights
        root = root or name
        links.append(Link(name, side, np.array(item.idxs, dtype=int), np.array(item.root_idxs, dtype=int), dim))
    return Coupled(root, tuple(links), output)
