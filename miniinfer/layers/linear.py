"""The linear layer, fused or not. Owns its parameters and their layout; how a product is computed beyond F.linear is for a packer or quant/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from miniinfer.kernels import Ops
from miniinfer.layers.layout import Layer, Layout, Part, Place
from miniinfer.layers.norm import RMSNorm

Packer = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]


class Linear(Layer):
    """y = x W^T + b with weight [out, in]. `parts` names the checkpoint modules that are stacked along `out` and their rows, in order,
    as in {"...q_proj": 512, "...k_proj": 128, "...v_proj": 128}. `shard_axis`: 0 splits the outputs over ranks, 1 the inputs."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, parts: dict[str, int], in_features: int, place: Place, *, bias: bool = False, shard_axis: int | None = None):
        super().__init__()
        rows = sum(parts.values())
        self.declare("weight", (rows, in_features), Layout(_stack(parts, "weight"), shard_axis), place)
        if bias:  # split with the outputs; where the inputs are split every rank has all of it
            self.declare("bias", (rows,), Layout(_stack(parts, "bias"), 0 if shard_axis == 0 else None), place)
        else:
            self.bias = None
        self._packed: Callable[[Tensor], Tensor] | None = None
        self._into: tuple[RMSNorm, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        return self._packed(x) if self._packed is not None else F.linear(x, self.weight, self.bias)

    def into(self, norm: RMSNorm, x: Tensor, residual: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """(norm(residual + self(x)), residual + self(x)): what stands between two products. The first may only be handed to the next."""
        if self._into is not None and self._into[0] is norm:
            return self._into[1](x, residual)
        return norm(self(x), residual, ops)

    def pack(self, pack_linear: Packer) -> None:
        """Computes with `pack_linear(weight, bias) -> (x -> y)` from now on. For serving: no gradient passes.

        The packer may rearrange nothing: it reads the weight where it lies, so that the memory is not paid twice and new values copied
        into the parameter take effect."""
        self._packed = pack_linear(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def pack_into(self, norm: RMSNorm, after: Linear | None, pack_into_norm: Callable[..., Any]) -> None:
        """Computes `into` this norm with `pack_into_norm` from now on, if there is a way. This and the product `after`, which alone takes what it
        makes, have been packed; None: it is for others, too."""
        bias = None if self.bias is None else self.bias.detach()
        packed = pack_into_norm(self.weight.detach(), bias, norm.weight.detach(), norm.eps, None if after is None else after.weight.detach())
        self._into = (norm, packed) if packed is not None else None

    def unpack(self) -> None:
        """Undoes `pack` and `pack_into`."""
        self._packed = self._into = None


def _stack(parts: dict[str, int], kind: str) -> tuple[Part, ...]:
    result, offset = [], 0
    for name, rows in parts.items():
        result.append(Part(f"{name}.{kind}", offset, rows))
        offset += rows
    return tuple(result)
