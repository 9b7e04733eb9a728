"""The decoder-only transformer: one skeleton for every family. A family's file builds the block, its only difference.

Owns the forward pass and the head. Knows nothing of requests, files or devices other than where its parameters lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from miniinfer.batch import Batch
from miniinfer.config import ModelConfig
from miniinfer.layers.attention import Attention
from miniinfer.layers.embedding import Embedding
from miniinfer.layers.layout import Layer, Place
from miniinfer.layers.linear import Linear, Packer
from miniinfer.layers.mlp import GatedMLP, SparseMLP
from miniinfer.layers.norm import RMSNorm
from miniinfer.layers.rotary import cos_sin_table


class Block(Layer):
    """Pre-norm attention, then pre-norm MLP. The residual travels beside the activations so that each norm adds and normalises at once."""

    def __init__(self, name: str, config: ModelConfig, place: Place, attention: Attention, mlp: GatedMLP | SparseMLP):
        super().__init__()
        self.input_norm = RMSNorm(f"{name}.input_layernorm", config.hidden_size, config.norm_eps, place)
        self.attention = attention
        self.mlp_norm = RMSNorm(f"{name}.post_attention_layernorm", config.hidden_size, config.norm_eps, place)
        self.mlp = mlp

    def forward(self, x: Tensor, residual: Tensor, batch: Batch, cos_sin: Tensor, norm: RMSNorm, last: bool = False) -> tuple[Tensor, Tensor]:
        """From (the normed sum so far, the sum), each [T, hidden], to the same behind this block, normed by `norm`: the next block's, or the last.
        The `last` block's are those of batch.wanted, if not all are."""
        x = self.attention(x, batch, cos_sin, last)
        if last and batch.wanted is not None:
            residual = residual.index_select(0, batch.wanted)
        x, residual = self.attention.o.into(self.mlp_norm, x, residual, batch.ops)
        return self.mlp.into(norm, x, residual, batch.ops)


MakeBlock = Callable[[str, ModelConfig, int, Place], Block]  # (checkpoint name, config, layer index, place)


class Decoder(Layer):
    """Token ids to hidden states, and hidden states to logits. `max_len` is the number of positions that the rotary table covers."""

    cos_sin: Tensor

    def __init__(self, config: ModelConfig, make_block: MakeBlock, place: Place, max_len: int):
        super().__init__()
        self.config = config
        tied = config.tie_embeddings
        self.embed = Embedding("model.embed_tokens", config.vocab_size, config.hidden_size, place, also="lm_head" if tied else None)
        self.layers = nn.ModuleList(make_block(f"model.layers.{i}", config, i, place) for i in range(config.num_layers))
        self.norm = RMSNorm("model.norm", config.hidden_size, config.norm_eps, place)
        self.head = Linear({"lm_head": config.vocab_size}, config.hidden_size, place.on_meta() if tied else place, shard_axis=0)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("cos_sin", cos_sin_table(config.rope, config.head_dim, max_len, place.device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """`.to`, `.bfloat16` and the like move the rotary table but must not round it."""
        table = self.cos_sin
        super()._apply(fn, recurse)
        self.cos_sin = table.to(self.cos_sin.device)
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states [T, hidden] after the final norm, in the parameters' dtype; [B, hidden] of batch.wanted. Without caches this is
        differentiable (reference ops)."""
        blocks = self._blocks()
        x, residual = blocks[0].input_norm(self.embed(batch.ids), None, batch.ops)
        for block, norm in zip(blocks, [*(b.input_norm for b in blocks[1:]), self.norm], strict=True):
            x, residual = block(x, residual, batch, self.cos_sin, norm, block is blocks[-1])
        return x

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab] in the parameters' dtype; sampling, log-probabilities and losses compute in fp32 from there."""
        return self.head(hidden)

    def pack(self, pack_linear: Packer, pack_gated: Packer | None = None, pack_into_norm: Callable[..., Any] | None = None) -> None:
        """Packs every linear layer, the head included, and if there is a way the gated MLPs' products, and norms between products. See
        Linear.pack and Linear.pack_into."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(pack_linear)
            elif isinstance(module, GatedMLP) and pack_gated is not None:
                module.pack(pack_gated)
        if pack_into_norm is not None:
            blocks = self._blocks()
            for block, after in zip(blocks, [*blocks[1:], None], strict=True):
                if isinstance(block.mlp, GatedMLP):
                    block.attention.o.pack_into(block.mlp_norm, block.mlp.gate_up, pack_into_norm)
                    if after is not None:  # the last norm is for others than products, too
                        block.mlp.down.pack_into(after.input_norm, after.attention.qkv, pack_into_norm)

    def unpack(self) -> None:
        """Forgets what packers have made, and with it the memory that they took."""
        for module in self.modules():
            if isinstance(module, Linear | GatedMLP):
                module.unpack()
