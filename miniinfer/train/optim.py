"""The optimizer: Muon for the matrices, AdamW for everything else, fp32 master weights, and the learning-rate schedule.

Owns the update of parameters from their gradients. A matrix is what the checkpoint calls one: fused parameters are updated part by part.
Sources: AdamW [Loshchilov & Hutter 2019]; Muon [Jordan 2024], its Newton-Schulz iteration with that author's coefficients.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from miniinfer.layers.layout import layouts


def schedule(progress: float, warmup: float, decay: float) -> float:
    """Factor on the learning rate at `progress` in [0, 1]: linear from 0 over the first `warmup`, 1, linear to 0 over the last `decay`."""
    rising = progress / warmup if warmup > 0 else 1.0
    falling = (1 - progress) / decay if decay > 0 else 1.0
    return max(0.0, min(1.0, rising, falling))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """[n, rows, cols] -> about the nearest matrices with all singular values near 1, by a quintic Newton-Schulz iteration.

    In bf16 on a GPU, else fp32: the iteration tolerates low precision."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Optimizer:
    """`muon` False makes it plain AdamW. Gradients are read from `.grad`; parameters below fp32 are rounded copies of fp32 masters."""

    def __init__(self, model: nn.Module, lr: float, matrix_lr: float, weight_decay: float, muon: bool = True):
        self.lr, self.matrix_lr, self.weight_decay = lr, matrix_lr, weight_decay
        self.momentum, self.betas, self.eps = 0.95, (0.9, 0.95), 1e-8
        self.steps = 0
        self.params: list[Tensor] = [param for _, param, _ in layouts(model)]
        self.masters = [param.detach().float().clone() for param in self.params]
        self.grads = [torch.zeros_like(master) for master in self.masters]
        self.first = [torch.zeros_like(master) for master in self.masters]
        self.adam: list[int] = []
        self.matrices: dict[tuple[int, ...], list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)  # shape -> (master, gradient, momentum) views
        for i, (name, param, layout) in enumerate(layouts(model)):
            if muon and param.ndim == 2 and name.split(".")[0] not in ("embed", "head"):
                for part in layout.parts:
                    views = tuple(part.view(x) for x in (self.masters[i], self.grads[i], self.first[i]))
                    self.matrices[tuple(views[0].shape)].append(views)  # type: ignore[arg-type]
            else:
                self.adam.append(i)
        self.second = {i: torch.zeros_like(self.masters[i]) for i in self.adam}

    @torch.no_grad()
    def step(self, factor: float, clip: float) -> Tensor:
        """One update with learning rates times `factor`; gradients are scaled to a norm of at most `clip`, then dropped. Returns their norm."""
        self.steps += 1
        found = [param.grad if param.grad is not None else torch.zeros_like(param) for param in self.params]
        torch._foreach_copy_(self.grads, found)
        norm = torch.stack(torch._foreach_norm(self.grads)).norm()
        torch._foreach_mul_(self.grads, (clip / (norm + 1e-6)).clamp(max=1.0))
        self._adamw(factor * self.lr)
        for views in self.matrices.values():
            self._muon(views, factor * self.matrix_lr)
        torch._foreach_copy_(self.params, self.masters)
        for param in self.params:
            param.grad = None
        return norm

    def _adamw(self, lr: float) -> None:
        b1, b2 = self.betas
        masters, grads = [self.masters[i] for i in self.adam], [self.grads[i] for i in self.adam]
        first, second = [self.first[i] for i in self.adam], list(self.second.values())
        torch._foreach_lerp_(first, grads, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, grads, grads, 1 - b2)
        scale = torch._foreach_sqrt(torch._foreach_div(second, 1 - b2**self.steps))
        torch._foreach_add_(scale, self.eps)
        decayed = [m for m in masters if m.ndim > 1]  # norms are not decayed
        torch._foreach_mul_(decayed, 1 - lr * self.weight_decay)
        torch._foreach_addcdiv_(masters, first, scale, -lr / (1 - b1**self.steps))

    def _muon(self, views: list[tuple[Tensor, Tensor, Tensor]], lr: float) -> None:
        masters, grads, momenta = ([v[i] for v in views] for i in range(3))
        torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
        update = orthogonalize(torch.stack(torch._foreach_lerp(grads, momenta, self.momentum)))  # Nesterov's look ahead
        rows, cols = update.shape[1:]
        torch._foreach_mul_(masters, 1 - lr * self.weight_decay)
        torch._foreach_add_(masters, list(update.unbind()), alpha=-lr * max(1.0, rows / cols) ** 0.5)

    def state_dict(self) -> dict[str, Any]:
        """All that a later run needs to go on exactly."""
        return {"steps": self.steps, "masters": self.masters, "first": self.first, "second": list(self.second.values())}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to a saved state; parameters are set, too."""
        self.steps = state["steps"]
        for mine, saved in ((self.masters, state["masters"]), (self.first, state["first"]), (list(self.second.values()), state["second"])):
            for target, source in zip(mine, saved, strict=True):
                target.copy_(source)
        torch._foreach_copy_(self.params, self.masters)
