"""RMSNorm as a module: owns the weight; the computation is an op."""

from __future__ import annotations

from torch import Tensor, nn

from miniinfer.kernels import Ops
from miniinfer.layers.layout import Layer, Layout, Part, Place


class RMSNorm(Layer):
    """Root mean square norm over the last dimension [Zhang & Sennrich 2019]."""

    weight: nn.Parameter

    def __init__(self, name: str, width: int, eps: float, place: Place):
        super().__init__()
        self.eps = eps
        self.declare("weight", (width,), Layout((Part(f"{name}.weight", 0, width),), ones=True), place)

    def forward(self, x: Tensor, residual: Tensor | None, ops: Ops) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); without a residual yet, x itself starts it."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps), x
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
