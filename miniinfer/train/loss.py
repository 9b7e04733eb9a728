"""Losses: sums of per-token terms, each with its weight. What is divided by what is the trainer's business."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of weight * -log p(target). logits [n, V] of any float dtype, targets [n] int64, weights [n] fp32 -> scalar fp32."""
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()
