"""Full fine-tuning: every parameter trains, from the pre-trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from lora_ga.errors import SetupError
from lora_ga.methods.base import Method, Setup


@dataclass(frozen=True, kw_only=True)
class FullFinetune(Method):
    """All weights of the model, with plain AdamW."""

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        if self.steps.whole_matrices:
            raise SetupError(
                f"{type(self.steps).__name__} steps move LoRA pairs and full_ft has none: use method/steps=adamw"
            )

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        return model.requires_grad_(True)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the whole model, as it differs from the base everywhere."""
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"full_ft exports a transformers model, not {type(model).__name__}")
        model.save_pretrained(folder)
