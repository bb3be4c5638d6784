"""LoRA (arXiv 2106.09685) and the variants PEFT carries as a switch.

rsLoRA (arXiv 2312.03732): use_rslora, scaling alpha / sqrt(r). DoRA (arXiv 2402.09353): use_dora. LoRA+ (arXiv
2402.12354) and LoRA-Pro (arXiv 2407.18242) start as LoRA does and differ in `steps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peft import LoraConfig, PeftModel
from torch import nn

from lora_ga.adapters import attach_lora, export_adapter
from lora_ga.engines import Engine
from lora_ga.errors import SetupError
from lora_ga.methods.base import Method, Setup


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """lora_A Kaiming-uniform, lora_B zero. Defaults: r 8, alpha 16, as in LoRA-GA, LoRA-Pro and LoRA-One."""

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_field: ClassVar[str] = "r"  # the setting that decides `smallest_side`
    keeps_function: ClassVar[bool] = False  # by taking its starting product off the base

    @property
    def smallest_side(self) -> int:
        """Least number of rows and columns a target must have."""
        return self.r

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse a rank that a target layer cannot hold."""
        if self.use_dora and self.steps.whole_matrices:
            raise SetupError(
                f"{type(self.steps).__name__} steps move lora_A and lora_B only and would leave DoRA's magnitudes "
                "untrained: use method/steps=adamw or method.use_dora=false"
            )
        if self.use_dora and self.keeps_function:
            raise SetupError(
                f"{type(self).__name__} takes its starting product off the base, and DoRA would rescale the rest: "
                "use method.use_dora=false"
            )
        if self.r < 1:
            raise SetupError(f"method.r={self.r}: the rank must be at least 1")
        name, shape = min(shapes.items(), key=lambda item: min(item[1]))
        if self.smallest_side > min(shape):
            rank = getattr(self, self.rank_field)
            limit = min(shape) * rank // self.smallest_side
            raise SetupError(
                f"method.{self.rank_field}={rank} does not fit {name} of shape {shape[0]} x {shape[1]}: "
                f"use {self.rank_field} <= {limit}, "
                "or leave the layer out of model.target_modules"
            )

    def check_engine(self, engine: Engine) -> None:
        if self.use_dora and engine.shards_weights:
            raise SetupError("DoRA reads whole base weights at every step, ZeRO-3 has none: use launcher=ddp or zero2")

    def check_alignment(self) -> None:
        if self.use_dora:
            raise SetupError("DoRA rescales W + s B A, whose steps train.alignment_every measures: set it to null")

    def peft_config(self, setup: Setup) -> LoraConfig:
        """PEFT's configuration of these adapters."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it, a fraction is as good
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            target_modules=list(setup.target_modules),
        )

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        return attach_lora(model, self.peft_config(setup), setup.seed)

    def export(self, model: nn.Module, folder: Path) -> None:
        if not isinstance(model, PeftModel):
            raise TypeError(f"{type(self).__name__} exports a PEFT model, not {type(model).__name__}")
        export_adapter(model, folder)
