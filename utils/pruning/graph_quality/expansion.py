"""The average vertex expansion of a bipartite graph, estimated on random vertex sets.

Of each side draw sets S whose size k is uniform in 1 to ceil(n / 2) - 1 (at least 1, where that is empty), and take the
mean of |neighbours of S| / k over the sets of both sides. It is an average, not the worst case that defines expanders.
"""

from __future__ import annotations

import numpy as np

_WORDS = 1 << 22


class Expansion:
    """Estimates graphs with `inputs` and `outputs` vertices, all on the same random sets, so that they compare fairly.

    samples: sets per side.
    """

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, samples: int = 1000) -> None:
        self._inputs, self._outputs = (_Sets(n, samples, rng) for n in (inputs, outputs))

    def __call__(self, edges: np.ndarray) -> float:
        """The estimate for `edges`, bool [outputs, inputs]."""
        return self.of_edges(*np.nonzero(edges))

    def of_edges(self, outputs: np.ndarray, inputs: np.ndarray) -> float:
        """The estimate for edges listed by their ends, int [edges] each."""
        return 0.5 * (self._inputs.expansion(inputs, outputs) + self._outputs.expansion(outputs, inputs))


class _Sets:
    """Random sets of one side's vertices; `bits` [vertices, words] has a bit per set that the vertex is in."""

    def __init__(self, vertices: int, samples: int, rng: np.random.Generator) -> None:
        self.samples = samples
        self.sizes = rng.integers(1, max(1, (vertices + 1) // 2 - 1), size=samples, endpoint=True)
        words = -(-samples // 64)
        member = np.zeros((64 * words, vertices), dtype=bool)
        for sample, size in enumerate(self.sizes):
            member[sample, rng.permutation(vertices)[:size]] = True
        self.bits = np.packbits(np.ascontiguousarray(member.T), axis=1).view(np.uint64)

    def expansion(self, ends: np.ndarray, others: np.ndarray) -> float:
        """Mean over the sets of neighbours per vertex; `ends` lie on this side, `others` on the other one."""
        order = np.argsort(others, kind="stable")
        ends, others = ends[order], others[order]
        starts = np.flatnonzero(np.diff(others, prepend=-1))
        neighbours = np.zeros(64 * self.bits.shape[1], dtype=np.int64)
        step = max(1, _WORDS // max(1, len(ends)))
        for word in range(0, self.bits.shape[1], step):
            if not len(ends):
                break
            touched = np.bitwise_or.reduceat(self.bits[ends, word : word + step], starts, axis=0)
            counts = np.unpackbits(np.ascontiguousarray(touched).view(np.uint8), axis=1).sum(axis=0)
            neighbours[64 * word : 64 * word + len(counts)] = counts
        return float((neighbours[: self.samples] / self.sizes).mean())
