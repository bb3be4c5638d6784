"""How the trainable parameters move, chosen by configuration and independent of where they start.

AdamW; LoRA+ (arXiv 2402.12354) by PEFT's create_loraplus_optimizer; LoRA-Pro (arXiv 2407.18242) in lora_pro.py; the
preconditioned AdamW of LoRA-One (arXiv 2502.01235) in scaled_adamw.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from lora_ga.adapters import adapter_pairs, trainable
from lora_ga.errors import SetupError
from lora_ga.optim.lora_pro import LoraProAdamW, Mode, XChoice
from lora_ga.optim.scaled_adamw import ScaledAdamW

MOMENT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def _known(field: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SetupError(f"method.steps.{field}={value} is unknown: use one of {', '.join(known)}")


def _pairs(model: nn.Module, who: str) -> list[tuple[nn.Parameter, nn.Parameter, float]]:
    """Every adapter pair; SetupError without pairs, or with trainable parameters that no pair would move."""
    if not adapter_pairs(model):
        raise SetupError(f"{who} steps need LoRA adapters; method full_ft has none: use method/steps=adamw")
    others = [
        name for name in trainable(model) if not name.endswith((".lora_A.default.weight", ".lora_B.default.weight"))
    ]
    if others:
        raise SetupError(
            f"{who} steps move lora_A and lora_B only, and {others[0]} is trainable too: use method/steps=adamw"
        )
    return [(pair.lora_A, pair.lora_B, pair.scaling) for pair in adapter_pairs(model)]


@dataclass(frozen=True, kw_only=True)
class Steps(ABC):
    """Base. `whole_matrices`: lora_A and lora_B must reach the optimizer as matrices, not flattened or sharded."""

    whole_matrices: ClassVar[bool] = False

    @abstractmethod
    def optimizer(self, model: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer over the model's trainable parameters; SetupError where it does not apply to the model."""


@dataclass(frozen=True, kw_only=True)
class AdamW(Steps):
    """torch's AdamW over all trainable parameters."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def optimizer(self, model: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            list(trainable(model).values()),
            lr=learning_rate,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=weight_decay,
            fused=True,  # one pass over the moments, which is most of full fine-tuning's step on a CPU
        )


@dataclass(frozen=True, kw_only=True)
class LoraPlus(Steps):
    """AdamW with a learning rate for lora_B that is `loraplus_lr_ratio` times lora_A's."""

    loraplus_lr_ratio: float = 16.0  # LoRA+ paper, section 5; LoRA-GA's conf/peft
    loraplus_lr_embedding: float = 1e-6  # PEFT
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def optimizer(self, model: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        if not isinstance(model, PeftModel) or not adapter_pairs(model):
            raise SetupError("LoRA+ steps need LoRA adapters; method full_ft has none: use method/steps=adamw")
        optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=learning_rate,
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            loraplus_lr_embedding=self.loraplus_lr_embedding,
            loraplus_weight_decay=weight_decay,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
        )
        # PEFT leaves empty groups in; DeepSpeed drops them, and then rates and groups no longer match (its issue 756).
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer


@dataclass(frozen=True, kw_only=True)
class LoraPro(Steps):
    """LoRA-Pro's AdamW; see `LoraProAdamW` for the fields."""

    whole_matrices: ClassVar[bool] = True
    mode: Mode = "full"
    X: XChoice = "sylvester"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    delta: float = 1e-8  # repo
    moment_dtype: str = "float32"

    def __post_init__(self) -> None:
        _known("mode", self.mode, get_args(Mode))
        _known("X", self.X, get_args(XChoice))
        _known("moment_dtype", self.moment_dtype, tuple(MOMENT_DTYPES))

    def optimizer(self, model: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return LoraProAdamW(
            _pairs(model, "LoRA-Pro"),
            lr=learning_rate,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=weight_decay,
            mode=self.mode,
            X=self.X,
            delta=self.delta,
            moment_dtype=MOMENT_DTYPES[self.moment_dtype],
        )


@dataclass(frozen=True, kw_only=True)
class Scaled(Steps):
    """Preconditioned AdamW; see `ScaledAdamW` for the fields."""

    whole_matrices: ClassVar[bool] = True
    delta: float = 1e-6  # LoRA-One repo, prec_reg
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def optimizer(self, model: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return ScaledAdamW(
            _pairs(model, "scaled AdamW"),
            lr=learning_rate,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=weight_decay,
            delta=self.delta,
        )
