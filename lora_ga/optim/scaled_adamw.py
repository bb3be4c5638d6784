"""Scaled AdamW: each factor's gradient preconditioned by the other factor, as in LoRA-One's first release.

Riemannian preconditioned LoRA (arXiv 2402.02347, scaled AdamW); LoRA-One (arXiv 2502.01235). Reference:
YuanheZ/LoRA-One prec_logTrainer.py, in its history only. As there: no bias correction, lora_B's preconditioner sees
the lora_A already moved, the pair's scaling is left to Adam, weight decay comes after a factor's step.
Differs in: pairs are batched by shape; the r x r inverses are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_ga.optim.pairs import PairBatch, PairOptimizer, adam_direction_, solve_dtype, write


def preconditioner(factor: torch.Tensor, delta: float) -> torch.Tensor:
    """(F F^T + delta I)^-1, (..., r, r), of F (..., r, d) in F's dtype; the identity where there is no inverse."""
    wide = factor.to(solve_dtype(factor.device))
    identity = torch.eye(wide.shape[-2], dtype=wide.dtype, device=wide.device)  # (r, r)
    inverse, info = torch.linalg.inv_ex(wide @ wide.mT + delta * identity)
    return torch.where((info == 0)[..., None, None], inverse, identity).to(factor.dtype)


class ScaledAdamW(PairOptimizer):
    """AdamW on (B^T B + delta I)^-1 G_A and G_B (A A^T + delta I)^-1, without bias correction.

    Args:
        pairs: (lora_A (r, d_in), lora_B (d_out, r), scaling) of every adapted layer.
        weight_decay: decoupled, each factor shrinks by 1 - lr * weight_decay after its step.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[nn.Parameter, nn.Parameter, float]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 1e-6,
        moment_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.delta = delta
        super().__init__(pairs, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, moment_dtype)

    def _update(self, batch: PairBatch, rows: slice, group: dict[str, Any]) -> None:
        A, grad_A, B, grad_B = batch.stacked(rows)
        decay = 1 - group["lr"] * group["weight_decay"]

        def moved(factor: torch.Tensor, gradient: torch.Tensor, key: nn.Parameter) -> torch.Tensor:
            direction = adam_direction_(gradient, *self._moments(batch, key, rows), group["betas"], group["eps"])
            return (factor - group["lr"] * direction) * decay

        write(batch.lora_A[rows], moved(A, preconditioner(B.mT, self.delta) @ grad_A, batch.lora_A[0]))
        A = batch.stacked(rows)[0]  # as rounded to the parameters' dtype
        write(batch.lora_B[rows], moved(B, grad_B @ preconditioner(A, self.delta), batch.lora_B[0]))
