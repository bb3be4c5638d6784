"""AdaLoRA: adapters in SVD form whose ranks are cut during training.

AdaLoRA (arXiv 2303.10512). Adapters, importance and schedule are PEFT's; what is ours is that the schedule is really
called after every optimizer step (transformers' Trainer does not) and the orthogonality penalty joins the loss.
LoRA-GA's baseline: PEFT's defaults with target_r 8, init_r 12 (hyperparameters of Outsider565/LoRA-GA conf/peft).
Differs in: tinit and tfinal are fractions of the run, since PEFT's default of 0 cuts from the first step on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel
from torch import nn

from lora_ga.adapters import TRAINED, attach_lora
from lora_ga.engines import Engine
from lora_ga.errors import SetupError
from lora_ga.methods.base import Setup
from lora_ga.methods.lora import Lora

SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator


@dataclass(frozen=True, kw_only=True)
class AdaLora(Lora):
    """Adapters of rank `init_r` cut to `r` on average between `tinit` and the last `tfinal` of the run."""

    init_r: int = 12  # PEFT's default, LoRA-GA's baseline
    tinit: float = 0.1
    tfinal: float = 0.3
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    rank_field: ClassVar[str] = "init_r"

    @property
    def smallest_side(self) -> int:
        return self.init_r

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().check(shapes)
        if self.steps.whole_matrices:
            raise SetupError(
                f"AdaLoRA's SVD factors cannot take {type(self.steps).__name__} steps: use method/steps=adamw"
            )
        if self.use_dora or self.use_rslora:
            raise SetupError("AdaLoRA has its own scaling: set method.use_dora=false and method.use_rslora=false")
        if self.init_r <= self.r:
            raise SetupError(f"AdaLoRA cuts ranks: method.init_r={self.init_r} must exceed method.r={self.r}")
        if not 0 <= self.tinit + self.tfinal < 1:
            raise SetupError(
                f"method.tinit + method.tfinal = {self.tinit + self.tfinal} leaves no steps to cut ranks in"
            )

    def peft_config(self, setup: Setup) -> AdaLoraConfig:
        tinit, tfinal = int(self.tinit * setup.total_steps), int(self.tfinal * setup.total_steps)
        return AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # as in Lora
            lora_dropout=self.lora_dropout,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=self.deltaT,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orth_reg_weight,
            total_step=setup.total_steps,
            target_modules=list(setup.target_modules),
        )

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        return attach_lora(model, self.peft_config(setup), setup.seed)

    def penalty(self, model: nn.Module) -> torch.Tensor:
        """orth_reg_weight times the mean over factors of ||P P^T - I||_F, as PEFT's forward adds it to a loss."""
        terms = []
        for name, factor in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = factor @ factor.T if "lora_A" in name else factor.T @ factor  # (r, r)
                terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self.orth_reg_weight * torch.stack(terms).mean()

    def check_alignment(self) -> None:
        raise SetupError("AdaLoRA cuts ranks between steps, train.alignment_every measures W + s B A: set it to null")

    def check_engine(self, engine: Engine) -> None:
        if engine.kind == "deepspeed":
            raise SetupError("AdaLoRA reads whole gradients after each step, DeepSpeed keeps none: use launcher=ddp")

    def state(self, model: nn.Module) -> dict[str, Any]:
        """The importance scores that decide which ranks go."""
        allocator = _adapted(model).rankallocator
        scores = {name: dict(getattr(allocator, name)) for name in SCORES}
        return {**scores, "rank_pattern": dict(_settings(model).rank_pattern or {})}

    def load_state(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        allocator = _adapted(model).rankallocator
        for name in SCORES:
            setattr(allocator, name, dict(state[name]))
        _settings(model).rank_pattern = dict(state["rank_pattern"])

    def after_step(self, model: nn.Module, step: int) -> None:
        config = _settings(model)
        _adapted(model).update_and_allocate(step)
        used, full = ranks(model)
        if step == config.total_step and used >= full:
            raise RuntimeError(f"AdaLoRA's rank did not shrink: {used} of {full} singular values are still in use")


def _adapted(model: nn.Module) -> AdaLoraModel:
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, AdaLoraModel):
        raise TypeError(f"AdaLoRA steps its own PEFT model, not {type(model).__name__}")
    return model.base_model


def _settings(model: nn.Module) -> AdaLoraConfig:
    config = _adapted(model).peft_config[TRAINED]
    assert isinstance(config, AdaLoraConfig)
    return config


def ranks(model: nn.Module) -> tuple[int, int]:
    """Singular values in use (not masked to zero) and in all, summed over the adapted layers."""
    values = [parameter for name, parameter in model.named_parameters() if "lora_E" in name]
    return sum(int((value != 0).sum()) for value in values), sum(value.numel() for value in values)
