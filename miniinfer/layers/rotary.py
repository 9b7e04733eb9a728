"""Rotary position embedding: the table of cosines and sines for each kind of scaling. Applying it is an op (rope_qkv).

Sources: RoPE [Su 2021], linear interpolation [Chen 2023], dynamic NTK and YaRN [Peng 2023], llama3 [Llama 3.1's model card].
Frequencies are fp32 throughout, as models are trained with them: more precise ones would differ at far positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from miniinfer.config import RopeConfig


def cos_sin_table(config: RopeConfig, head_dim: int, max_len: int, device: torch.device | str) -> Tensor:
    """fp32 [max_len, head_dim] for positions 0 to max_len - 1: cosines in the first half of the columns, sines in the second.

    Dynamic scaling chooses its base once, from max_len: a key that is cached has been rotated already, so the base must not
    follow the sequence's length as in the original formula. Up to the original length the two agree if max_len is at most that."""
    frequencies, scale = _frequencies(config, head_dim, max_len)
    angles = torch.arange(max_len, device=device, dtype=torch.float32).unsqueeze(1) * frequencies.to(device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * scale


def _frequencies(config: RopeConfig, dim: int, max_len: int) -> tuple[Tensor, float]:
    """Radians per position [dim / 2] fp32, and the factor on cosines and sines."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if config.kind == "dynamic":
        original = _original(config)
        stretch = config.factor * max(max_len, original) / original - (config.factor - 1)
        return 1.0 / (config.theta * stretch ** (dim / (dim - 2))) ** exponents, 1.0
    plain = 1.0 / config.theta**exponents
    if config.kind == "linear":
        return plain / config.factor, 1.0
    if config.kind == "llama3":
        return _llama3(config, plain), 1.0
    if config.kind == "yarn":
        return _yarn(config, plain, dim), _yarn_scale(config)
    return plain, 1.0


def _original(config: RopeConfig) -> int:
    assert config.original_max_position is not None, "config.py fills it for every kind that needs it"
    return config.original_max_position


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Slow waves are stretched by the factor, fast ones kept, those between are blended by how often they turn in the original length."""
    turns = _original(config) * plain / (2 * math.pi)
    keep = ((turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * plain / config.factor + keep * plain


def _yarn(config: RopeConfig, plain: Tensor, dim: int) -> Tensor:
    """NTK by parts: a ramp over the dimensions between those that turn beta_fast and beta_slow times in the original length."""

    def dimension(turns: float) -> float:
        return dim * math.log(_original(config) / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / config.factor * stretched + plain * (1 - stretched)


def _yarn_scale(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0

    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)
