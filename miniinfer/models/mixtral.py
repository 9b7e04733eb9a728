"""Mixtral: Mistral's attention; every MLP is a mixture of experts whose projections are called w1 (gate), w3 (up) and w2 (down)."""

from __future__ import annotations

from miniinfer.config import ModelConfig
from miniinfer.layers.attention import Attention
from miniinfer.layers.layout import Place
from miniinfer.layers.mlp import SparseMLP
from miniinfer.models.decoder import Block


def block(name: str, config: ModelConfig, index: int, place: Place) -> Block:
    attention = Attention(f"{name}.self_attn", config, index, place)
    mlp = SparseMLP(
        f"{name}.block_sparse_moe", ("w1", "w3", "w2"), config.hidden_size, config.expert_intermediate_size,
        config.num_experts, config.experts_per_token, place, renormalize=True,
    )  # fmt: skip
    return Block(name, config, place, attention, mlp)
