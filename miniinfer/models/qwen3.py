"""Qwen3: queries and keys are normed per head before the rotation."""

from __future__ import annotations

from miniinfer.config import ModelConfig
from miniinfer.layers.attention import Attention
from miniinfer.layers.layout import Place
from miniinfer.layers.mlp import GatedMLP
from miniinfer.models.decoder import Block


def attention(name: str, config: ModelConfig, index: int, place: Place) -> Attention:
    """Shared with Qwen3-MoE."""
    return Attention(f"{name}.self_attn", config, index, place, qkv_bias=config.qkv_bias, o_bias=config.o_bias, qk_norm=True)


def block(name: str, config: ModelConfig, index: int, place: Place) -> Block:
    mlp = GatedMLP(f"{name}.mlp", config.hidden_size, config.intermediate_size, place)
    return Block(name, config, place, attention(name, config, index, place), mlp)
