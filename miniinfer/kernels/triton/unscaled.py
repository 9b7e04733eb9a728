"""An RMS norm that is half done, on its way from the product before it to the product behind it, which save its kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Unscaled:
    """The norm of `[T, K]` numbers without its division: y = W (values / rms), so that a product can divide its sums instead.

    Of one token `values` are the numbers themselves, and the product has the norm's `weight` and their squares still to take. Of more they have
    been multiplied with the weight, and `squares` [T, parts] fp32 add up to the sum of the numbers' squares."""

    values: Tensor
    weight: Tensor
    squares: Tensor | None
    eps: float

    def __len__(self) -> int:
        return len(self.values)
