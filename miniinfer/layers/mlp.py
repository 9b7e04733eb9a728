"""The gated MLP, dense and as a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from miniinfer.kernels import Ops
from miniinfer.layers.layout import Layer, Layout, Part, Place
from miniinfer.layers.linear import Linear, Packer
from miniinfer.layers.norm import RMSNorm


class GatedMLP(Layer):
    """down(silu(gate(x)) * up(x)) [Shazeer 2020]; gate and up are one product."""

    def __init__(self, name: str, hidden: int, inner: int, place: Place, *, bias: bool = False):
        super().__init__()
        self.gate_up = Linear({f"{name}.gate_proj": inner, f"{name}.up_proj": inner}, hidden, place, bias=bias, shard_axis=0)
        self.down = Linear({f"{name}.down_proj": hidden}, inner, place, bias=bias, shard_axis=1)

        self._packed: Callable[[Tensor], Tensor] | None = None

    def into(self, norm: RMSNorm, x: Tensor, residual: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """See Linear.into."""
        return self.down.into(norm, self._packed(x) if self._packed is not None else ops.silu_mul(self.gate_up(x)), residual, ops)

    def pack(self, pack_gated: Packer) -> None:
        """Computes silu(gate) * up with `pack_gated(weight, bias) -> (x -> y)` from now on; see Linear.pack."""
        weight, bias = self.gate_up.weight, self.gate_up.bias
        self._packed = pack_gated(weight.detach(), None if bias is None else bias.detach())

    def unpack(self) -> None:
        """Undoes `pack`; the linear layers see to themselves."""
        self._packed = None


class SparseMLP(Layer):
    """A router and `experts` gated MLPs, of which each token takes `top_k`: w13 [E, 2 I, hidden] (gate rows, then up rows), w2 [E, hidden, I].

    `name` is the checkpoint's module, `projections` its names of an expert's (gate, up, down). Checkpoints that keep the experts stacked
    in two tensors are read too."""

    w13: nn.Parameter
    w2: nn.Parameter

    def __init__(
        self, name: str, projections: tuple[str, str, str], hidden: int, inner: int, experts: int, top_k: int, place: Place, *, renormalize: bool
    ):
        super().__init__()
        self.top_k, self.renormalize = top_k, renormalize
        self.router = Linear({f"{name}.gate": experts}, hidden, place)
        gate, up, down = projections
        w13, w2 = [], []
        for e in range(experts):
            prefix = f"{name}.experts.{e}"
            w13 += [Part(f"{prefix}.{gate}.weight", 0, inner, e), Part(f"{prefix}.{up}.weight", inner, inner, e)]
            w2 += [Part(f"{prefix}.{down}.weight", 0, hidden, e)]
        stacked13, stacked2 = ((Part(f"{name}.experts.{part}", 0, experts),) for part in ("gate_up_proj", "down_proj"))
        self.declare("w13", (experts, 2 * inner, hidden), Layout(tuple(w13), 0, alternatives=(stacked13,)), place)
        self.declare("w2", (experts, hidden, inner), Layout(tuple(w2), 1, alternatives=(stacked2,)), place)

    def into(self, norm: RMSNorm, x: Tensor, residual: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """See Linear.into."""
        experts = (x, self.router(x), self.w13, self.w2, self.top_k, self.renormalize)
        if ops.moe_into_norm is None:
            return norm(ops.moe(*experts), residual, ops)
        return ops.moe_into_norm(*experts, residual, norm.weight, norm.eps)
