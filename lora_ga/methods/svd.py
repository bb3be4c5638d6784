"""Truncated singular value decompositions for the starts, exact or randomised (torch.svd_lowrank).

LoRA-GA's code uses q = 4r and 4 power iterations, LoRA-One's q = 512 and 16 whatever the rank. Differs in: q is
clipped to the matrix, so small models work, the random test matrix has a seed of its own, and signs are fixed: the
largest entry of each column of U is positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_ga.low_rank import Gradient, LowRank


@dataclass(frozen=True)
class TruncatedSVD:
    """How to decompose: `oversampling` columns per wanted one and `niter` power iterations; 0 columns means exact."""

    oversampling: int = 2
    niter: int = 4
    seed: int = 0

    def columns(self, k: int) -> int:
        """How many directions of a matrix to keep where k are wanted and the matrix itself is not kept."""
        return max(self.oversampling, 2) * k

    def __call__(self, matrix: Gradient, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Leading k singular triplets of (d_out, d_in): U (d_out, k), S (k,), Vh (k, d_in), at least float32.

        Of factors they are exact; ValueError if those have fewer than k directions.
        """
        U, S, Vh = self._of_factors(matrix, k) if isinstance(matrix, LowRank) else self._of_matrix(matrix, k)
        # A pair of singular vectors has no sign of its own, and rounding decides it: another machine, or another number
        # of ranks behind the gradient, would start somewhere else.
        largest = U.abs().argmax(0, keepdim=True)  # (1, q)
        signs = torch.where(U.gather(0, largest) < 0, -1.0, 1.0).to(U)  # (1, q)
        return (U * signs)[:, :k], S[:k], (Vh * signs.mT)[:k]

    def _of_matrix(self, matrix: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        q = min(self.oversampling * k, *matrix.shape)
        if self.oversampling == 0 or q == min(matrix.shape):
            return torch.linalg.svd(matrix, full_matrices=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            U, S, V = torch.svd_lowrank(matrix, q=q, niter=self.niter)
        return U, S, V.mH

    @staticmethod
    def _of_factors(matrix: LowRank, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if len(matrix.right) < k:
            raise ValueError(f"{k} singular directions are wanted, and the factors have {len(matrix.right)}")
        U, S, Vh = torch.linalg.svd(matrix.right, full_matrices=False)
        return matrix.left @ U, S, Vh


EXACT = TruncatedSVD(oversampling=0)
