"""Qwen2 and 2.5: biases on q, k and v alone; the later layers may have a sliding window."""

from __future__ import annotations

from miniinfer.config import ModelConfig
from miniinfer.layers.attention import Attention
from miniinfer.layers.layout import Place
from miniinfer.layers.mlp import GatedMLP
from miniinfer.models.decoder import Block


def block(name: str, config: ModelConfig, index: int, place: Place) -> Block:
    attention = Attention(f"{name}.self_attn", config, index, place, qkv_bias=True)
    mlp = GatedMLP(f"{name}.mlp", config.hidden_size, config.intermediate_size, place)
    return Block(name, config, place, attention, mlp)
