"""From a ModelConfig to a model: which family builds which block."""

from __future__ import annotations

import torch
from torch import nn

from miniinfer.config import ModelConfig
from miniinfer.layers.layout import Place, Take
from miniinfer.models import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from miniinfer.models.decoder import Decoder, MakeBlock

BLOCKS: dict[str, MakeBlock] = {
    "llama": llama.block,
    "mistral": mistral.block,
    "qwen2": qwen2.block,
    "qwen3": qwen3.block,
    "qwen3_moe": qwen3_moe.block,
    "mixtral": mixtral.block,
}


def build(config: ModelConfig, dtype: torch.dtype, device: torch.device | str, max_len: int | None = None, take: Take | None = None) -> Decoder:
    """A model with uninitialised parameters straight on the device ("meta": shapes only). `max_len`: positions it is to serve, by
    default the model's own limit; `take(shape, dtype)` makes the parameters' memory there. Fill it with models/weights.py."""
    return Decoder(config, BLOCKS[config.family], Place(dtype, torch.device(device), take), max_len or config.max_position)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, a shared one once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
