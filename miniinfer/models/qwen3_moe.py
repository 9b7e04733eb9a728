"""Qwen3-MoE: Qwen3's attention; most layers have a mixture of experts for an MLP."""

from __future__ import annotations

from miniinfer.config import ModelConfig
from miniinfer.layers.layout import Place
from miniinfer.layers.mlp import GatedMLP, SparseMLP
from miniinfer.models.decoder import Block
from miniinfer.models.qwen3 import attention


def block(name: str, config: ModelConfig, index: int, place: Place) -> Block:
    mlp: GatedMLP | SparseMLP
    if config.moe_layers[index]:
        mlp = SparseMLP(
            f"{name}.mlp", ("gate_proj", "up_proj", "down_proj"), config.hidden_size, config.expert_intermediate_size,
            config.num_experts, config.experts_per_token, place, renormalize=config.renormalize_experts,
        )  # fmt: skip
    else:
        mlp = GatedMLP(f"{name}.mlp", config.hidden_size, config.intermediate_size, place)
    return Block(name, config, place, attention(name, config, index, place), mlp)
