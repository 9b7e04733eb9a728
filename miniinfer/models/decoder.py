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
        self._chain: tuple[RMSNorm, Callable[..., tuple[Tensor, Tensor] | None]] | None = None

    def forward(
        self, x: Tensor, residual: Tensor, batch: Batch, cos_sin: Tensor, norm: RMSNorm, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """From (the normed sum so far, the sum), each [T, hidden], to the same behind this block, normed by `norm`: the next block's, or the last.
        Of the tokens `wanted` alone, if there are such."""
        x = self.attention(x, batch, cos_sin, wanted)
        if wanted is not None:
            residual = residual.index_select(0, wanted)
        if self._chain is not None and self._chain[0] is norm and (both := self._chain[1](x, residual)) is not None:
            return both
        x, residual = self.attention.o.into(self.mlp_norm, x, residual, batch.ops)
        return self.mlp.into(norm, x, residual, batch.ops)

    def pack_chain(self, after: Block, pack_chain: Callable[..., Any]) -> None:
        """Computes all from this block's attention to the qkv of the block `after` with `pack_chain` from now on, if there is a way and that block
        comes next: see Linear.pack. What it hands on only that qkv understands."""
        o, qkv = self.attention.o, after.attention.qkv
        if isinstance(self.mlp, GatedMLP) and o.bias is None and self.mlp.gate_up.bias is None and self.mlp.down.bias is None:
            weights = [w.detach() for w in (o.weight, self.mlp.gate_up.weight, self.mlp.down.weight, qkv.weight)]
            bias = None if qkv.bias is None else qkv.bias.detach()
            chain = pack_chain(*weights, bias, self.mlp_norm.weight.detach(), after.input_norm.weight.detach(), self.mlp_norm.eps)
            self._chain = (after.input_norm, chain) if chain is not None else None

    def unpack(self) -> None:
        """Undoes `pack_chain`."""
        self._chain = None


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
            x, residual = block(x, residual, batch, self.cos_sin, norm, batch.wanted if block is blocks[-1] else None)
        return x

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab] in the parameters' dtype; sampling, log-probabilities and losses compute in fp32 from there."""
        return self.head(hidden)

    def pack(
        self, pack_linear: Packer, pack_gated: Packer | None = None, pack_into_norm: Callable[..., Any] | None = None,
        pack_chain: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        """Packs every linear layer, the head included, and if there is a way the gated MLPs' products, norms between products, and all products
        between two attentions. See Linear.pack, Linear.pack_into and Block.pack_chain."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(pack_linear)
            elif isinstance(module, GatedMLP) and pack_gated is not None:
                module.pack(pack_gated)
        blocks = self._blocks()
        if pack_chain is not None:
            for block, behind in zip(blocks, blocks[1:], strict=False):
                block.pack_chain(behind, pack_chain)
        if pack_into_norm is not None:
            for block, after in zip(blocks, [*blocks[1:], None], strict=True):
                mlp = block.mlp if isinstance(block.mlp, GatedMLP) else None
                block.attention.o.pack_into(block.mlp_norm, mlp.gate_up if mlp is not None else None, pack_into_norm)
                if mlp is not None and after is not None:
                    mlp.down.pack_into(after.input_norm, after.attention.qkv, pack_into_norm)

    def unpack(self) -> None:
        """Forgets what packers have made, and with it the memory that they took."""
        for module in self.modules():
            if isinstance(module, Linear | GatedMLP | Block):
                module.unpack()
