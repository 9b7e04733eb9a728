"""Grouped-query attention with rotary positions, over the batch's cache or, without one, over the batch itself."""

from __future__ import annotations

from torch import Tensor

from miniinfer.batch import Batch
from miniinfer.config import ModelConfig
from miniinfer.layers.layout import Layer, Place
from miniinfer.layers.linear import Linear
from miniinfer.layers.norm import RMSNorm


class Attention(Layer):
    """Layer `index`'s attention; `name` is the checkpoint's name of the module. Options are the block's, see models/."""

    def __init__(
        self, name: str, config: ModelConfig, index: int, place: Place, *,
        qkv_bias: bool = False, o_bias: bool = False, qk_norm: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.index = index
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.window = config.windows[index]
        self.kind = config.state_kinds.index(self.window)
        self.eps = config.norm_eps
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        rows = {f"{name}.q_proj": q, f"{name}.k_proj": kv, f"{name}.v_proj": kv}
        self.qkv = Linear(rows, config.hidden_size, place, bias=qkv_bias, shard_axis=0)
        self.o = Linear({f"{name}.o_proj": config.hidden_size}, q, place, bias=o_bias, shard_axis=1)
        self.q_norm = RMSNorm(f"{name}.q_norm", config.head_dim, config.norm_eps, place) if qk_norm else None
        self.k_norm = RMSNorm(f"{name}.k_norm", config.head_dim, config.norm_eps, place) if qk_norm else None

    def forward(self, x: Tensor, batch: Batch, cos_sin: Tensor, wanted: Tensor | None = None) -> Tensor:
        """[T, hidden] -> the heads' values [T, heads * head_dim], which `o` takes; cos_sin as layers/rotary.py makes it.

        Those of the tokens `wanted` alone, if there are such: of the others only keys and values are needed."""
        ops, scale = batch.ops, self.head_dim**-0.5
        q_weight = self.q_norm.weight if self.q_norm else None
        k_weight = self.k_norm.weight if self.k_norm else None
        rope = (self.qkv(x), self.num_heads, self.num_kv_heads, cos_sin, batch.positions, q_weight, k_weight, self.eps)
        if batch.caches is None:
            q, k, v = ops.rope_qkv(*rope)
            out = ops.attention(q, k, v, batch.query_start, scale, self.window, batch.max_query)
        else:
            (k, v), view = batch.caches[self.index], batch.kinds[self.kind]
            place = (view.page_table, batch.rows, batch.query_start, batch.lengths, scale, self.window, batch.max_query, batch.max_length)
            if wanted is not None:
                q = ops.rope_qkv_cache(*rope, k, v, view.slots)
                if batch.alone is None:
                    out = ops.paged_attention(q, k, v, *place).index_select(0, wanted)
                else:
                    place = (view.page_table, batch.rows, batch.alone, batch.lengths, scale, self.window, 1, batch.max_length)
                    out = ops.paged_attention(q.index_select(0, wanted), k, v, *place)
            elif ops.rope_paged_attention is not None:
                out = ops.rope_paged_attention(*rope, k, v, view.slots, *place)
            else:
                out = ops.paged_attention(ops.rope_qkv_cache(*rope, k, v, view.slots), k, v, *place)
        return out.flatten(1)
