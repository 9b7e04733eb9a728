"""The token embedding: a table [vocabulary, hidden] read by row."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from miniinfer.layers.layout import Layer, Layout, Part, Place


class Embedding(Layer):
    """ids [T] int32 -> rows [T, hidden]. Where the head shares the table, a checkpoint may hold it under the head's name alone (`also`)."""

    weight: nn.Parameter

    def __init__(self, name: str, rows: int, width: int, place: Place, also: str | None = None):
        super().__init__()
        alternatives = ((Part(f"{also}.weight", 0, rows),),) if also else ()
        self.declare("weight", (rows, width), Layout((Part(f"{name}.weight", 0, rows),), 0, alternatives=alternatives), place)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)
