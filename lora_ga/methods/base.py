"""What a method is: which parameters train and where they start, how they move, what is handed out.

A method is a frozen dataclass of its paper's hyperparameters in PEFT's spelling. How the parameters move is its field
`steps`, so that any start runs with any optimizer by configuration alone (`method=lora_one method/steps=lora_pro`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lora_ga.engines import Engine
from lora_ga.low_rank import Gradient
from lora_ga.optim.steps import AdamW, Steps


@dataclass(frozen=True)
class Setup:
    """What a start may ask for.

    `gradients(k)` estimates (or reads from the cache) name -> G (d_out, d_in), whole or the k leading directions of it;
    `full_precision` says that the forward pass will compute in float32 (no autocast).
    """

    target_modules: tuple[str, ...]
    gradients: Callable[[int], dict[str, Gradient]]
    seed: int
    total_steps: int
    full_precision: bool = True


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods; `step0` is the promise checked before training: the function is kept, or it moves."""

    steps: Steps = field(default_factory=AdamW)
    step0: ClassVar[Literal["identity", "shift"]] = "identity"
    needs_gradients: ClassVar[bool] = False

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse, with SetupError, settings that no layer of shape (d_out, d_in) allows; runs before weights load."""

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        """Return the model with its trainable parameters chosen and at their start."""
        raise TypeError(f"{type(self).__name__} does not say what it trains")

    def optimizer(self, model: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer over the model's trainable parameters."""
        return self.steps.optimizer(model, learning_rate=learning_rate, weight_decay=weight_decay)

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """A scalar the method adds to the loss of each step, or None."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after optimizer step number `step` (from 1), while gradients are still there."""

    def check_engine(self, engine: Engine) -> None:
        """Refuse, with SetupError, an engine this method would not be itself under; runs before weights load."""

    def check_alignment(self) -> None:
        """Refuse, with SetupError, to measure steps of a weight that is not W + scaling * lora_B lora_A."""

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What the method itself remembers between steps, beside parameters and optimizer; part of a checkpoint."""
        return {}

    def load_state(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Take `state` back."""

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write what a user of the untouched base model needs to have the trained model."""
        raise TypeError(f"{type(self).__name__} does not say what it hands out")
