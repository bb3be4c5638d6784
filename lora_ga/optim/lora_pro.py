"""LoRA-Pro: move lora_A and lora_B so that their product follows the full gradient.

LoRA-Pro (arXiv 2407.18242, theorem 2.1 and algorithms 1, 2). Reference: mrflogs/LoRA-Pro
DeepSpeed-0.15.1/deepspeed/runtime/zero/stage_1_and_2.py, lorapro_full_adjustment; "efficient" is its earlier
peta.optim.AdamW. Differs in: eigh of the symmetric Gram matrices in float64 for pinv and complex eig; the pair's true
scaling, not 2; Adam's bias correction starts at t = 1 (the repo's at 2: first step 0.744 as long); moments are in
`optimizer.state`, so checkpoints hold them; pairs are batched by shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from lora_ga.optim.compiled import fits, through_moments
from lora_ga.optim.pairs import PairBatch, PairOptimizer, adam_direction_, solve_dtype, write

Mode = Literal["full", "efficient"]
XChoice = Literal["sylvester", "symmetric", "zero"]

# Of one weight-size temporary, two of which exist at a time: what stays in a CPU's cache, what fills an accelerator.
CHUNK_BYTES_CPU = 1 << 23
CHUNK_BYTES = 1 << 26


class _Adjuster:
    """The closed form for fixed factors: their Gram matrices are decomposed once, for any number of gradients.

    What is r x r is computed in float64, as it squares condition numbers; the factors keep their own dtype.
    """

    def __init__(self, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, delta: float) -> None:
        self.dtype = solve_dtype(lora_A.device)
        self.scaling, self.A, self.B = scaling, lora_A, lora_B
        A, B = lora_A.to(self.dtype), lora_B.to(self.dtype)
        self.a, self.U = torch.linalg.eigh(B.mT @ B)  # (..., r), (..., r, r)
        self.b, self.V = torch.linalg.eigh(A @ A.mT)  # (..., r), (..., r, r)
        self.inverse_BB = _damped_inverse(self.a, self.U, delta)  # (..., r, r)
        self.inverse_AA = _damped_inverse(self.b, self.V, delta)  # (..., r, r)

    def sylvester_X(self, grad_A: torch.Tensor) -> torch.Tensor:
        C = -(self.inverse_BB @ (grad_A @ self.A.mT).to(self.dtype)) / self.scaling**2  # (..., r, r)
        sums = self.a.clamp(min=0).unsqueeze(-1) + self.b.clamp(min=0).unsqueeze(-2)  # (..., r, r)
        rotated = self.U.mT @ C @ self.V  # (..., r, r)
        # Both zero only where A and B both lost the direction; then C is zero there too and so is the least X.
        return self.U @ torch.where(sums > 0, rotated / sums, 0.0) @ self.V.mT

    def __call__(self, grad_A: torch.Tensor, grad_B: torch.Tensor, choice: str) -> tuple[torch.Tensor, torch.Tensor]:
        inverse_AA, inverse_BB = self.inverse_AA / self.scaling**2, self.inverse_BB / self.scaling**2
        # What of grad_B lies in B's columns: (..., r, r)
        own = self.inverse_BB @ (self.B.mT @ grad_B).to(self.dtype) @ inverse_AA
        if choice == "sylvester":
            X = self.sylvester_X(grad_A)
        elif choice == "symmetric":
            X = -own / 2
        elif choice == "zero":
            X = torch.zeros_like(own)
        else:
            raise ValueError(f"X={choice!r} is unknown: use sylvester, symmetric or zero")

        def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left.to(grad_A.dtype) @ right.to(grad_A.dtype)

        g_A = product(inverse_BB, grad_A).add_(product(X, self.A))  # (..., r, d_in)
        g_B = product(grad_B, inverse_AA).sub_(product(self.B, own + X))  # (..., d_out, r)
        return g_A, g_B


def _damped_inverse(values: torch.Tensor, vectors: torch.Tensor, delta: float) -> torch.Tensor:
    """(M + delta I)^-1 of M = vectors diag(values) vectors^T; directions below rounding are dropped, as by pinv."""
    damped = values + delta  # (..., r)
    floor = torch.finfo(values.dtype).eps * values.shape[-1] * damped.amax(-1, keepdim=True)
    inverted = torch.where(damped > floor.clamp(min=0), 1 / damped, 0.0)  # (..., r)
    return (vectors * inverted.unsqueeze(-2)) @ vectors.mT


def sylvester_X(
    lora_A: torch.Tensor, lora_B: torch.Tensor, grad_A: torch.Tensor, scaling: float, delta: float = 1e-8
) -> torch.Tensor:
    """X (..., r, r) that keeps g_A, g_B closest to LoRA's own gradients, in grad_A's dtype.

    Solves (B^T B) X + X (A A^T) = -(1/s^2) (B^T B + delta I)^-1 G_A A^T; arguments as in `adjust`.
    """
    adjuster = _Adjuster(lora_A, lora_B, scaling, delta)
    return adjuster.sylvester_X(grad_A).to(grad_A.dtype)


def equivalent_gradient(
    lora_A: torch.Tensor, lora_B: torch.Tensor, g_A: torch.Tensor, g_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Direction s B g_A + s g_B A, (..., d_out, d_in), in which W moves when A moves along g_A and B along g_B."""
    return (scaling * torch.cat([lora_B, g_B], dim=-1)) @ torch.cat([g_A, lora_A], dim=-2)


def adjust(
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    grad_A: torch.Tensor,
    grad_B: torch.Tensor,
    scaling: float,
    X: XChoice = "sylvester",
    delta: float = 1e-8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor gradients whose equivalent gradient is as close to the full gradient G as rank allows.

    Args:
        lora_A, grad_A: (..., r, d_in), grad_A = s B^T G.
        lora_B, grad_B: (..., d_out, r), grad_B = s G A^T.
        scaling: s of the forward pass W + s B A.
        X: how the freedom that cancels in the equivalent gradient is spent: "sylvester" stays closest to grad_A and
            grad_B, "symmetric" gives both factors half of the shared part, "zero" gives it to A.
        delta: added to the diagonals of both Gram matrices before they are inverted.
    Returns:
        g_A (..., r, d_in), g_B (..., d_out, r) in the gradients' dtypes; at B = 0 g_A = 0. Unknown X: ValueError.
    """
    return _Adjuster(lora_A, lora_B, scaling, delta)(grad_A, grad_B, X)


class LoraProAdamW(PairOptimizer):
    """LoRA-Pro with Adam's moments.

    Args:
        pairs: (lora_A (r, d_in), lora_B (d_out, r), scaling) of every adapted layer.
        mode: "full" feeds the equivalent gradient to Adam moments of the weight's size (two of (d_out, d_in) a layer)
            and adjusts Adam's direction once more; "efficient" adjusts once and keeps moments of the factors' size.
        X: see `adjust`; in full mode for the second adjustment, the first needs none.
        weight_decay: decoupled, lora_A and lora_B shrink by 1 - lr * weight_decay before the update: this draws the
            weight to its pretrained value, not to zero. All the authors' runs use 0.
        moment_dtype: bfloat16 halves full mode's memory, but rounds small changes away: the second moment then
            rises and hardly falls (beta2 = 0.999 asks for 0.1 percent a step, bfloat16 resolves 0.4).
    """

    def __init__(
        self,
        pairs: Sequence[tuple[nn.Parameter, nn.Parameter, float]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        mode: Mode = "full",
        X: XChoice = "sylvester",
        delta: float = 1e-8,
        moment_dtype: torch.dtype = torch.float32,
    ) -> None:
        if mode not in ("full", "efficient"):
            raise ValueError(f"mode={mode!r} is unknown: use full or efficient")
        if X not in ("sylvester", "symmetric", "zero"):
            raise ValueError(f"X={X!r} is unknown: use sylvester, symmetric or zero")
        self.mode, self.X, self.delta = mode, X, delta
        super().__init__(pairs, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, moment_dtype)

    def _state_shapes(self, batch: PairBatch) -> dict[nn.Parameter, torch.Size]:
        if self.mode == "efficient":
            return super()._state_shapes(batch)
        d_out, _, d_in = batch.shape
        return {batch.lora_B[0]: torch.Size((d_out, d_in))}

    def _update(self, batch: PairBatch, rows: slice, group: dict[str, Any]) -> None:
        A, grad_A, B, grad_B = batch.stacked(rows)
        adjuster = _Adjuster(A, B, batch.scaling, self.delta)
        corrections = self._bias_corrections(batch, rows, group["betas"])
        if self.mode == "full":
            g_A, g_B = adjuster(grad_A, grad_B, "zero")
            moments = self._moments(batch, batch.lora_B[0], rows)
            grad_A, grad_B = _through_moments(A, B, g_A, g_B, batch.scaling, moments, corrections, group)
            g_A, g_B = adjuster(grad_A, grad_B, self.X)
        else:
            g_A, g_B = adjuster(grad_A, grad_B, self.X)
            first, second = corrections
            for g, key in ((g_A, batch.lora_A[0]), (g_B, batch.lora_B[0])):
                moments = self._moments(batch, key, rows)
                adam_direction_(g, *moments, group["betas"], group["eps"] * second).mul_(second / first)
        decay, lr = 1 - group["lr"] * group["weight_decay"], group["lr"]
        write(batch.lora_A[rows], A * decay - lr * g_A)
        write(batch.lora_B[rows], B * decay - lr * g_B)


def _through_moments(
    A: torch.Tensor,
    B: torch.Tensor,
    g_A: torch.Tensor,
    g_B: torch.Tensor,
    scaling: float,
    moments: tuple[torch.Tensor, torch.Tensor],
    corrections: tuple[torch.Tensor, torch.Tensor],
    group: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pass the equivalent gradient through full-size Adam moments (n, d_out, d_in), updated in place.

    Returns the factor gradients s B^T u (n, r, d_in) and s u A^T (n, d_out, r) of Adam's direction u. Only a few layers
    of u exist at a time.
    """
    n, d_out, d_in = moments[0].shape
    first, second = corrections
    bias = second / first  # (n, 1, 1), of u: applied to the results, where it costs a factor and not a weight
    if fits(moments[0], A):
        found = through_moments(A, B, g_A, g_B, scaling, moments, group["betas"], (group["eps"] * second).flatten())
        if found is not None:
            return found[0].mul_(scaling * bias), found[1].mul_(bias)
    chunk = CHUNK_BYTES_CPU if A.device.type == "cpu" else CHUNK_BYTES
    layers = max(1, chunk // (A.element_size() * d_out * d_in))
    grad_A, grad_B = torch.empty_like(A), torch.empty_like(B)
    for start in range(0, n, layers):
        part = slice(start, start + layers)
        u = equivalent_gradient(A[part], B[part], g_A[part], g_B[part], scaling)  # (layers, d_out, d_in)
        adam_direction_(u, moments[0][part], moments[1][part], group["betas"], group["eps"] * second[part])
        torch.bmm(B[part].mT, u, out=grad_A[part])
        torch.bmm(u, A[part].mT, out=grad_B[part])
    return grad_A * (scaling * bias), grad_B * (scaling * bias)
