"""LoRA-One: start at one spectral gradient step and keep it.

LoRA-One (arXiv 2502.01235, algorithm 1). Reference: YuanheZ/LoRA-One run_exp.py. -G ~ U S Vh, singular values divided
by the largest, lora_B_0 = U_r sqrt(S_r) / sqrt(gamma), lora_A_0 = sqrt(S_r) Vh_r / sqrt(gamma); W stays, so the start
is W - s / (gamma sigma_1) [G]_r: the loss moves at step 0. The paper's gamma is the code's 1/gamma; here the code's.
The preconditioned variant is `method/steps=scaled`. Its README calls the left factor A; here it is PEFT's lora_B.
Differs in: svd_lowrank with q = 4r and 16 iterations instead of q = 512, which a small layer does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from lora_ga.adapters import adapter_pairs, attach_lora, set_factors
from lora_ga.low_rank import Gradient
from lora_ga.methods.base import Setup
from lora_ga.methods.lora import Lora
from lora_ga.methods.svd import TruncatedSVD


def lora_one_factors(
    G: Gradient, r: int, *, stable_gamma: float = 128.0, svd: TruncatedSVD | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (r, d_in), lora_B (d_out, r) with lora_B lora_A = -[G]_r / (gamma sigma_1) for G (d_out, d_in)."""
    U, S, Vh = (svd or TruncatedSVD(4, 16))(-G, r)
    root = (S / (S[0] * stable_gamma)).sqrt()  # (r,)
    return root[:, None] * Vh, U * root


@dataclass(frozen=True, kw_only=True)
class LoraOne(Lora):
    """LoRA started at the gradient's leading directions, with rsLoRA's scaling."""

    use_rslora: bool = True
    stable_gamma: float = 128.0  # repo HEAD and Llama; its first T5 script has 16
    svd_oversampling: int = 4
    svd_niter: int = 16  # repo
    step0: ClassVar[Literal["identity", "shift"]] = "shift"
    needs_gradients: ClassVar[bool] = True

    @property
    def gradient_columns(self) -> int:
        """How many directions of each gradient the start asks for."""
        return TruncatedSVD(self.svd_oversampling).columns(self.r)

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        svd = TruncatedSVD(self.svd_oversampling, self.svd_niter, setup.seed)
        gradients = setup.gradients(self.gradient_columns)
        model = attach_lora(model, self.peft_config(setup), setup.seed)
        for pair in adapter_pairs(model):
            set_factors(pair, *lora_one_factors(gradients[pair.name], self.r, stable_gamma=self.stable_gamma, svd=svd))
        return model
