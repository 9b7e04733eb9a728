"""Tiny random checkpoints of every family, made with transformers, for tests of everything that runs a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,  # nothing ends by itself
    "pad_token_id": None,
}

_FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 24}),
    "qwen2": (
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}

FAMILIES = tuple(_FAMILIES)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A transformers model in fp32 with eager attention. All parameters are random, norms and biases too, and large enough that greedy
    tokens are decided clearly and that a wrong wiring shows."""
    make_config, make_model, own = _FAMILIES[family]
    config = make_config(**{**_SHAPE, **own, **overrides})
    model = make_model._from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if "norm" in name:
                param.copy_(1 + 0.2 * noise)
            elif param.dim() == 1:
                param.copy_(0.3 * noise)
            else:
                param.copy_(noise * (1.0 if "embed" in name else 1.5 * param.shape[-1] ** -0.5))
    return model


def tiny_folder(family: str, tmp_path: Path, **overrides: Any) -> Path:
    """A checkpoint folder (config.json, model.safetensors) of a tiny model; `overrides` go to the transformers config class."""
    folder = Path(tmp_path) / f"tiny-{family}"
    tiny_model(family, **overrides).save_pretrained(folder)
    return folder
