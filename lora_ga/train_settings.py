"""The budget of a training and what surrounds the optimizer, in transformers' spelling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import SchedulerType

from lora_ga.errors import SetupError


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The budget and the optimizer's surroundings, in transformers' spelling.

    `per_device_train_batch_size` is the most rows a device takes at once; see `micro_batch`.
    """

    learning_rate: float
    max_steps: int | None = None
    num_train_epochs: float = 1.0
    global_batch_size: int = 32
    per_device_train_batch_size: int = 32
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    autocast: str | None = None
    compile: bool = False
    length_bucketed: bool = True
    held_out_every: int | None = None
    held_out_rows: int = 32
    alignment_every: int | None = None

    def check(self) -> None:
        """Refuse an impossible budget before anything is loaded."""
        for name in ("learning_rate", "num_train_epochs", "global_batch_size", "per_device_train_batch_size"):
            if not getattr(self, name) > 0:
                raise SetupError(f"train.{name}={getattr(self, name)}: use a positive number")
        if not 0 <= self.warmup_ratio < 1:
            raise SetupError(f"train.warmup_ratio={self.warmup_ratio}: use a part of the run, at least 0 and below 1")
        schedules = [kind.value for kind in SchedulerType]
        if self.lr_scheduler_type not in schedules:
            raise SetupError(
                f"train.lr_scheduler_type={self.lr_scheduler_type} is unknown: use one of {', '.join(schedules)}"
            )
        if self.global_batch_size % self.per_device_train_batch_size:
            raise SetupError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of "
                f"train.per_device_train_batch_size={self.per_device_train_batch_size}: choose a divisor"
            )
        if self.autocast not in (None, "bfloat16"):
            raise SetupError(f"train.autocast={self.autocast} is not supported: use bfloat16, auto or null")
        if self.max_steps is not None and self.max_steps < 1:
            raise SetupError(f"train.max_steps={self.max_steps}: use a positive number, or null for whole epochs")
        if self.compile and self.alignment_every:
            raise SetupError("train.alignment_every watches layers that train.compile=true fuses: set one of them off")
        if self.alignment_every is not None and self.alignment_every < 1:
            raise SetupError(f"train.alignment_every={self.alignment_every}: use a number of steps, or null for never")

    def micro_batch(self, ranks: int) -> int:
        """Rows a rank takes at once: the most that per_device_train_batch_size allows and the global batch divides by.

        So a run is the same run on any number of ranks. SetupError if the ranks do not divide the global batch.
        """
        if self.global_batch_size % ranks:
            raise SetupError(
                f"train.global_batch_size={self.global_batch_size} does not divide over {ranks} processes: "
                "change launcher.nproc"
            )
        share = self.global_batch_size // ranks
        return max(m for m in range(1, self.per_device_train_batch_size + 1) if share % m == 0)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.autocast else None

    def total_steps(self, rows: int) -> int:
        """Optimizer steps for this many training rows; a last part of a batch counts as a step.

        SetupError if the warm-up would not end before them.
        """
        steps = self.max_steps or math.ceil(math.ceil(rows / self.global_batch_size) * self.num_train_epochs)
        if self.warmup_steps is not None and self.warmup_steps >= max(2, steps):
            raise SetupError(
                f"train.warmup_steps={self.warmup_steps} of {steps} steps leaves none at the learning rate: "
                "set it lower, or to null for train.warmup_ratio"
            )
        return steps
