"""One training run on transformers' Trainer: our loss, our batches, the method's optimizer, everything written down.

Differs from the stock Trainer in: the loss is a sum over target tokens divided by the tokens of the whole global batch,
so 1 x 32 and 32 x 1 accumulation are the same step; batches hold rows of like length; logits only where labels are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers import PrinterCallback, SchedulerType, Trainer, TrainerCallback, TrainingArguments

from lora_ga.adapters import adapter_pairs
from lora_ga.data.encoding import IGNORED, Collator, EncodedRows, LengthBucketSampler
from lora_ga.errors import SetupError
from lora_ga.losses import scored_logits
from lora_ga.methods.adalora import ranks
from lora_ga.methods.base import Method


class Diverged(RuntimeError):
    """A loss was not finite; `curve` is what was seen until then."""

    def __init__(self, message: str, curve: list[dict[str, float]]) -> None:
        super().__init__(message)
        self.curve = curve


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The budget and the optimizer's surroundings, in transformers' spelling."""

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
    length_bucketed: bool = True
    held_out_every: int | None = None
    held_out_rows: int = 32

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
            raise SetupError(f"train.autocast={self.autocast} is not supported: use bfloat16 or null")
        if self.max_steps is not None and self.max_steps < 1:
            raise SetupError(f"train.max_steps={self.max_steps}: use a positive number, or null for whole epochs")

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


@dataclass
class TrainResult:
    """Loss curve and cost of one training."""

    loss_curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    optimizer_state_mb: float = 0.0
    trainable_parameters: int = 0


class MethodTrainer(Trainer):
    """Trainer that lets the method own the optimizer and keeps the exact loss of each step."""

    def __init__(
        self,
        *,
        method: Method,
        settings: TrainSettings,
        data_seed: int,
        held_out: Callable[[], float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.method, self.settings, self.data_seed, self.held_out = method, settings, data_seed, held_out
        self.loss_is_scaled_for_ga = True
        self.curve: list[dict[str, float]] = []
        self.tokens = 0
        self.began = time.perf_counter()
        self._step_loss = 0.0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            assert isinstance(self.model, nn.Module)
            self.optimizer = self.method.optimizer(
                self.model, learning_rate=self.args.learning_rate, weight_decay=self.args.weight_decay
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        rows = self.train_dataset
        assert isinstance(rows, EncodedRows)
        lengths = rows.lengths() if self.settings.length_bucketed else [0] * len(rows)
        return LengthBucketSampler(lengths, self.settings.global_batch_size, self.data_seed)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Scored tokens of the global batch; Trainer would count one label too few, as ours are shifted already."""
        count = sum((batch["labels"] != IGNORED).sum() for batch in batch_samples)
        return self.accelerator.gather(torch.as_tensor(count, device=device)).sum()

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        logits, labels = scored_logits(model, inputs, self.settings.autocast_dtype, head=self.model)
        loss = F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(f"the loss was {value} at step {self.state.global_step + 1}", self.curve)
        self._step_loss += value
        self.tokens += int(inputs["attention_mask"].sum())
        penalty = self.method.penalty(model)
        if penalty is not None:
            loss = loss + penalty / self.current_gradient_accumulation_steps
        return loss * self.accelerator.num_processes  # DDP averages over ranks what is meant to be a sum

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            row = {
                "step": self.state.global_step,
                "loss": self._step_loss,
                "learning_rate": logs["learning_rate"],
                "grad_norm": float(logs.get("grad_norm", math.nan)),
                "tokens": self.tokens,
                "seconds": round(time.perf_counter() - self.began, 3),
            }
            self.curve.append({key: value for key, value in row.items() if math.isfinite(value)})
            every, step = self.settings.held_out_every, self.state.global_step
            if self.held_out and every and (step % every == 0 or step == self.state.max_steps):
                paused = time.perf_counter()
                self.curve[-1]["held_out_loss"] = self.held_out()
                self.began += time.perf_counter() - paused  # seconds are training's own
            logs["loss"], self._step_loss = self._step_loss, 0.0
        super().log(logs, start_time)


class _AfterStep(TrainerCallback):
    """Calls the method after each optimizer step, and moves a progress bar instead of printing a line a step."""

    def __init__(self, method: Method, steps: int) -> None:
        self.method = method
        self.bar = tqdm(total=steps, desc="train", unit="step")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.method.after_step(kwargs["model"], state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "learning_rate" in kwargs["logs"]:
            self.bar.set_postfix(loss=f"{kwargs['logs']['loss']:.3f}", refresh=False)
            self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def _samples(model: nn.Module) -> dict[str, torch.Tensor]:
    """A slice of every trainable tensor, small enough to keep: what `movement` compares."""
    return {n: p.detach().flatten()[:4096].clone() for n, p in model.named_parameters() if p.requires_grad}


def movement(before: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, Any]:
    """How many trainable tensors differ from `before`; raises RuntimeError if a lora_B, or everything, stood still."""
    now = _samples(model)
    still = [name for name, start in before.items() if torch.equal(start, now[name])]
    stuck = [name for name in still if "lora_B" in name]
    if stuck or len(still) == len(before):
        raise RuntimeError(f"training left {len(stuck or still)} tensors where they were, first {(stuck or still)[0]}")
    return {"trainable_tensors": len(before), "unmoved": len(still)}


def _arguments(settings: TrainSettings, output_dir: Path, steps: int, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.global_batch_size // settings.per_device_train_batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        # a value below 1 is a ratio of max_steps
        warmup_steps=settings.warmup_ratio if settings.warmup_steps is None else settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )


def train(
    model: nn.Module,
    rows: EncodedRows,
    collator: Collator,
    method: Method,
    settings: TrainSettings,
    *,
    output_dir: Path,
    seed: int,
    held_out: Callable[[], float] | None = None,
) -> tuple[TrainResult, dict[str, Any]]:
    """Train a prepared model in place; returns the curve with its cost, and what moved.

    `seed` orders the rows and drives dropout. `held_out` measures the loss on rows that are not trained on, every
    settings.held_out_every steps and after the last. Raises Diverged when a loss is not finite.
    """
    before = _samples(model)
    steps = settings.total_steps(len(rows))
    trainer = MethodTrainer(
        model=model,
        args=_arguments(settings, output_dir, steps, seed),
        method=method,
        settings=settings,
        data_seed=seed,
        held_out=held_out,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[_AfterStep(method, steps)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.began = time.perf_counter()
    trainer.train()
    assert trainer.optimizer is not None
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    tensors = (v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    result = TrainResult(
        loss_curve=trainer.curve,
        seconds=time.perf_counter() - trainer.began,
        optimizer_state_mb=sum(t.numel() * t.element_size() for t in tensors) / 2**20,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    # One step in all is the first of the warm-up, whose rate is zero.
    moved = movement(before, model) if any(row["learning_rate"] > 0 for row in trainer.curve) else {}
    return result, moved


def check_start(method: Method, before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    """Hold the method to its promise: the same logits at step 0 ("identity"), or other ones ("shift").

    `before` and `after` are float32 logits (N, vocabulary) of the same rows in eval mode; raises RuntimeError.
    """
    difference = float((after - before).abs().max())
    tolerance = 1e-3 * float(before.abs().max())
    kept = difference <= tolerance
    if kept != (method.step0 == "identity"):
        raise RuntimeError(
            f"{type(method).__name__} promised {method.step0} at step 0, but logits moved by {difference:.2e} "
            f"(tolerance {tolerance:.2e})"
        )
    return {"promise": method.step0, "max_abs_logit_difference": difference, "tolerance": tolerance}


@torch.no_grad()
def adapter_report(model: nn.Module) -> dict[str, Any]:
    """Adapted layers and the mean Frobenius norm of their scaled product; for AdaLoRA the ranks it has left."""
    used, full = ranks(model)
    if full:
        return {"ranks_in_use": used, "ranks_at_start": full}
    pairs = adapter_pairs(model)
    if not pairs:
        return {}
    norms = [pair.scaling * float(torch.linalg.matrix_norm(pair.lora_B @ pair.lora_A)) for pair in pairs]
    return {"layers": len(pairs), "scaling": pairs[0].scaling, "mean_product_norm": sum(norms) / len(norms)}
