"""Muon: momentum whose matrix updates are made (nearly) orthogonal, so that every direction moves alike.

Per token it learns clearly faster than AdamW on the matrices of a small transformer. The orthogonal factor
comes from five steps of a quintic Newton-Schulz iteration; stacked experts are orthogonalised one by one,
as a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace each of `(..., rows, columns)` by roughly the nearest matrix whose singular values are 1."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, times sqrt(max(1, rows / columns)); a fused matrix has `parts`."""

    def __init__(
        self, groups: list[dict], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                update = update.unflatten(-2, (group["parts"], -1))
                rows, columns = update.shape[-2:]
                update = orthogonal(update).reshape(parameter.shape) * max(1.0, rows / columns) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
