"""PiSSA: start the adapters at the principal part of the weight and freeze the rest.

PiSSA (arXiv 2404.02948, eq. 2-4). As run by LoRA-GA (reproduce/run_exp.py, init=svd): W ~ U S Vh, lora_B =
U_r sqrt(S_r / s), lora_A = sqrt(S_r / s) Vh_r, W <- W - s lora_B lora_A. svd_lowrank(q=4r, niter=4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lora_ga.adapters import adapter_pairs, attach_lora, keep_function, set_factors
from lora_ga.engines import whole
from lora_ga.methods.base import Setup
from lora_ga.methods.lora import Lora
from lora_ga.methods.svd import TruncatedSVD


def pissa_factors(W: torch.Tensor, r: int, scaling: float, *, svd: TruncatedSVD) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (r, d_in), lora_B (d_out, r) with scaling * lora_B lora_A = rank-r truncation of W (d_out, d_in)."""
    U, S, Vh = svd(W, r)
    root = (S / scaling).sqrt()  # (r,)
    return root[:, None] * Vh, U * root


@dataclass(frozen=True, kw_only=True)
class Pissa(Lora):
    """LoRA from the weight's leading singular directions."""

    svd_oversampling: int = 4  # q = 4r, LoRA-GA repo
    svd_niter: int = 4
    keeps_function: ClassVar[bool] = True

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        model = attach_lora(model, self.peft_config(setup), setup.seed)
        svd = TruncatedSVD(self.svd_oversampling, self.svd_niter, setup.seed)
        for pair in adapter_pairs(model):
            with whole([pair.base.weight]):
                factors = pissa_factors(pair.base.weight.data, self.r, pair.scaling, svd=svd)
            set_factors(pair, *factors)
        keep_function(model, full_precision=setup.full_precision)
        return model
