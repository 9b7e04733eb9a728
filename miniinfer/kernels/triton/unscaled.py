"""An RMS norm that is half done, on its way from the product before it to the product behind it, which save its kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Unscaled:
    """The norm of tokens without its division, which the product behind it does to its sums: `values` [T, K], multiplied with the norm's weight,
    and `squares` [T, parts] fp32, which add up to the sum of each token's squares before that."""

    values: Tensor
    squares: Tensor
    eps: float
