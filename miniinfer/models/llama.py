"""Llama 2 and 3: the plain block, with optional biases."""

from __future__ import annotations

from miniinfer.config import ModelConfig
from miniinfer.layers.attention import Attention
from miniinfer.layers.layout import Place
from miniinfer.layers.mlp import GatedMLP
from miniinfer.models.decoder import Block


def block(name: str, config: ModelConfig, index: int, place: Place) -> Block:
    attention = Attention(f"{name}.self_attn", config, index, place, qkv_bias=config.qkv_bias, o_bias=config.o_bias)
    mlp = GatedMLP(f"{name}.mlp", config.hidden_size, config.intermediate_size, place, bias=config.mlp_bias)
    return Block(name, config, place, attention, mlp)
