"""What ModelConfig.from_hf makes of `config.json`: shapes of published models, and refusals of what we would compute wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import FAMILIES, tiny_model

from miniinfer.config import ConfigError, ModelConfig
from miniinfer.models.registry import build

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def shape(architecture: str, **keys: Any) -> dict[str, Any]:
    return {**LLAMA, "architectures": [architecture], **keys}


# As published; the counts are those that the models' cards and safetensors headers give.
PUBLISHED = {
    "Llama-3.1-8B": ({**LLAMA, "rope_scaling": LLAMA3}, 8_030_261_248),
    "Mistral-7B-v0.1": (shape("MistralForCausalLM", vocab_size=32000, sliding_window=4096), 7_241_732_096),
    "Mixtral-8x7B": (
        shape("MixtralForCausalLM", vocab_size=32000, num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
        46_702_792_704,
    ),
    "Qwen2.5-7B": (
        shape(
            "Qwen2ForCausalLM", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, use_sliding_window=False, sliding_window=131072, max_window_layers=28,
        ),
        7_615_616_512,
    ),
    "Qwen3-8B": (
        shape("Qwen3ForCausalLM", vocab_size=151936, intermediate_size=12288, num_hidden_layers=36, head_dim=128),
        8_190_735_360,
    ),
    "Qwen3-0.6B": (
        shape(
            "Qwen3ForCausalLM", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            head_dim=128, tie_word_embeddings=True,
        ),
        596_049_920,
    ),
    "Qwen3-30B-A3B": (
        shape(
            "Qwen3MoeForCausalLM", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
        ),
        30_532_122_624,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_size(name: str) -> None:
    raw, count = PUBLISHED[name]
    config = ModelConfig.from_hf(raw)
    assert config.num_parameters == count
    assert sum(p.numel() for p in build(config, torch.bfloat16, "meta", max_len=8).parameters()) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_transformers_gives_them(family: str) -> None:
    theirs = type(tiny_model(family).config)()
    raw = {"architectures": [type(tiny_model(family)).__name__]}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        raw[key] = getattr(theirs, key)
    full = {**theirs.to_dict(), "architectures": raw["architectures"], "bos_token_id": None, "eos_token_id": None}
    assert ModelConfig.from_hf(raw) == ModelConfig.from_hf(full)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM is not supported; supported: LlamaForCausalLM"),
        ({"architectures": None, "model_type": "gemma"}, "architecture 'gemma' is not supported"),
        ({"vocab_size": None}, "the key 'vocab_size' is missing"),
        ({"hidden_size": "4096"}, "'hidden_size' must be a positive integer, got '4096'"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' must be a positive integer"),
        ({"num_key_value_heads": 5}, "'num_attention_heads' (32) is not a multiple of 'num_key_value_heads' (5)"),
        ({"head_dim": 127}, "'head_dim' (127) must be even"),
        ({"hidden_act": "gelu"}, "'hidden_act' 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "'quantization_config' is set ({'quant_method': 'awq'}), which is not supported"),
        ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is set (30.0)"),
        ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is set"),
        ({"embedding_multiplier": 12.0}, "'embedding_multiplier' is set"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' 0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "'partial_rotary_factor' 0.25"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "rope type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "rope type 'mrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs 'factor'"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "rope type 'llama3' needs 'low_freq_factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1}}, "rope parameter 'llama_4_scaling_beta'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope parameter 'full_attention' is not supported"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        (shape("Qwen2ForCausalLM", use_sliding_window=True, layer_types=["full_attention"]), "for each of the 32 layers"),
        (shape("Qwen3ForCausalLM", layer_types=["linear_attention"] * 32), "must say full_attention or sliding_attention"),
        (shape("Qwen3ForCausalLM", layer_types=["sliding_attention"] * 32), "contradicts 'sliding_window' (none) of a qwen3 model"),
        (shape("MistralForCausalLM", layer_types=["full_attention"] * 32), "contradicts 'sliding_window' (4096) of a mistral model"),
        (shape("MistralForCausalLM", sliding_window=[4096]), "'sliding_window' must be a number of tokens, got [4096]"),
        (shape("Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=8), "'num_experts_per_tok' (8) is more than the 4 experts"),
    ],
)  # fmt: skip
def test_refusals_name_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf({**LLAMA, **change}, source="some/config.json")
    assert str(error.value).startswith("some/config.json: ") and message in str(error.value)


def test_biases_follow_the_family() -> None:
    """`attention_bias` is heeded where transformers heeds it."""
    for architecture, wanted in (("LlamaForCausalLM", (True, True)), ("MistralForCausalLM", (False, False)), ("Qwen2ForCausalLM", (True, False))):
        config = ModelConfig.from_hf(shape(architecture, attention_bias=True))
        assert (config.qkv_bias, config.o_bias) == wanted


def test_from_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 5}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (5, 9)


def test_rope_original_length_as_transformers_reads_it() -> None:
    def original(**keys: Any) -> tuple[int | None, int]:
        raw = {**LLAMA, "max_position_embeddings": 1000, **keys}
        theirs = transformers.LlamaConfig(**{**raw, "rope_scaling": dict(raw["rope_scaling"])})
        theirs.standardize_rope_params()  # as its rotary module calls it again
        return ModelConfig.from_hf(raw).rope.original_max_position, theirs.rope_parameters.get("original_max_position_embeddings", 1000)

    yarn, dynamic = {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "dynamic", "factor": 4.0}
    for keys, wanted in (
        ({"rope_scaling": yarn}, 1000),
        ({"rope_scaling": {**yarn, "original_max_position_embeddings": 250}}, 250),
        ({"rope_scaling": {**yarn, "original_max_position_embeddings": 250}, "original_max_position_embeddings": 300}, 300),
        ({"rope_scaling": dynamic}, 1000),
    ):
        assert original(**keys) == (wanted, wanted)
