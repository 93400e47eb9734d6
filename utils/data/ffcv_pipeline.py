"""What of FFCV reads a file: its reader, its page cache and its pipeline, put together without its `Loader`.

FFCV's Loader compiles decoders anew for every loader, keeps sets per sample that cost hundreds of megabytes for a
million images, and, reading through the system's page cache, changes numba's shared type of byte arrays in place, which
breaks code compiled before. None of that is needed for decoders that are compiled already.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from utils.data.ffcv_import import (
    Compiler,
    Graph,
    OSCacheContext,
    OSCacheManager,
    PipelineSpec,
    ProcessCacheManager,
    Reader,
    ToDevice,
    ToTensor,
)
from utils.data.ffcv_ops import LabelDecoder, PlannedDecoder


class MappedFile(OSCacheManager):
    """FFCV's reading through the system's page cache, without the tables and code that only its own decoders use."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.ptrs = self.sizes = np.empty(0, np.uint64)
        self.context = OSCacheContext(self)


class Pipeline:
    """A file's reader, memory manager and pipeline: images decoded by `decoder` and labels, on `device`.

    `stages` are functions to call one after the other, each with the numbers of the nodes whose results it returns.
    """

    def __init__(self, file: Path, decoder: PlannedDecoder, device: torch.device, os_cache: bool) -> None:
        self.file = file
        self.decoder = decoder
        self.reader = Reader(str(file))
        self.memory_manager = MappedFile(self.reader) if os_cache else ProcessCacheManager(self.reader)
        move = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
        specs = {
            "image": PipelineSpec("image", decoder, [ToTensor(), *move]),
            "label": PipelineSpec("label", LabelDecoder(), [ToTensor(), *move]),
        }
        places = {name: place for place, name in enumerate(self.reader.handlers)}
        self.graph = Graph(specs, self.reader.handlers, places, self.reader.metadata, None)
        Compiler.set_enabled(False)  # the decoders are compiled already; wrapping them again costs seconds
        try:
            self.stages, _ = self.graph.codegen_all(self.graph.collect_requirements()[1])
        finally:
            Compiler.set_enabled(True)

    def node(self, operation: object) -> int:
        """The number of the node that runs `operation`."""
        (found,) = self.graph.operation_to_node[operation]
        return int(found.id)

    def leaf(self, name: str) -> int:
        """The number of the node whose result is the output `name`, whatever the order of the file's fields."""
        return int(self.graph.leaf_nodes[name].id)
