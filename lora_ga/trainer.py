"""transformers' Trainer with our loss, our batches, the method's optimizer, and checkpoints that lose nothing.

Differs from the stock Trainer in: the loss is a sum over target tokens divided by the tokens of the whole global batch,
so every split of it over ranks and accumulation is the same step; batches hold rows of like length; logits only where
labels are; a checkpoint is written whole or not at all and belongs to one training (lora_ga/checkpoints.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from lora_ga import checkpoints
from lora_ga.adapters import offset_factors, trainable
from lora_ga.alignment import Alignment
from lora_ga.data.encoding import IGNORED, EncodedRows, LengthBucketSampler, RankBatches, WithBlank
from lora_ga.engines import Engine, any_rank, confirm, is_main, rank, sum_over_ranks, world_size
from lora_ga.losses import scored_logits
from lora_ga.methods.base import Method
from lora_ga.optim.pairs import PairOptimizer
from lora_ga.optim.under_zero import PairsUnderZero
from lora_ga.train_settings import TrainSettings

TRAINER_STATE = "trainer_state.json"  # transformers reads the step from a file of this name


class Diverged(RuntimeError):
    """A loss was not finite; `curve` is what was seen until then."""

    def __init__(self, message: str, curve: list[dict[str, float]]) -> None:
        super().__init__(message)
        self.curve = curve


class Stopped(RuntimeError):
    """Training was told to stop; its state at a step boundary is on disk."""


@dataclass(frozen=True)
class Resume:
    """Where checkpoints go, when, and whose they are.

    `every`: steps between two, None for none but the one of a stop. `identity`: all that decides the training, compared
    on the way back. `stop`: asked after each step; True on any rank saves and ends training with `Stopped`.
    """

    folder: Path
    every: int | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    stop: Callable[[], bool] = lambda: False


class _Batches(DataLoader):
    """A loader that tells its batches which epoch it is; transformers asks loaders for that."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class MethodTrainer(Trainer):
    """Trainer that lets the method own the optimizer and keeps the exact loss of each step."""

    def __init__(
        self,
        *,
        method: Method,
        settings: TrainSettings,
        engine: Engine,
        data_seed: int,
        resume: Resume,
        held_out: Callable[[], float] | None = None,
        alignment: Alignment | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.method, self.settings, self.engine, self.data_seed = method, settings, engine, data_seed
        self.resume, self.held_out, self.alignment = resume, held_out, alignment
        self.loss_is_scaled_for_ga = True
        self.curve: list[dict[str, float]] = []
        self.tokens = 0
        self.began = time.perf_counter()
        self.pairs: PairsUnderZero | None = None
        self.found: dict[str, Any] = {}
        self.wanted: list[tuple[str, float]] = []
        self.stopped = False
        self._step_loss, self._own_norm = 0.0, math.nan
        self._measured: dict[str, float] = {}

    # The optimizer and the engine

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            assert isinstance(self.model, nn.Module)
            optimizer = self.method.optimizer(
                self.model, learning_rate=self.args.learning_rate, weight_decay=self.args.weight_decay
            )
            self.wanted = [(type(optimizer).__name__, group["lr"]) for group in optimizer.param_groups]
            if not self.engine_clips:
                optimizer.register_step_pre_hook(self._clip)
            if isinstance(optimizer, PairOptimizer) and self.engine.flattens:
                self.pairs = PairsUnderZero(optimizer)
                optimizer = self.pairs.engine_optimizer()
            self.optimizer = optimizer
        return self.optimizer

    @property
    def engine_clips(self) -> bool:
        return self.engine.clips(whole_matrices=self.method.steps.whole_matrices)

    def _clip(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        limit = self.settings.max_grad_norm or math.inf
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._own_norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        return super().create_scheduler(num_training_steps, self.pairs.optimizer if self.pairs else optimizer)

    def moving(self) -> torch.optim.Optimizer:
        """The optimizer that moves the method's parameters, under whatever wraps it."""
        if self.pairs:
            return self.pairs.optimizer
        found: Any = self.optimizer
        while hasattr(found, "optimizer"):
            found = found.optimizer
        return found

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.found = confirm(self.engine, model)
        self._confirm_optimizer()
        if self.pairs:
            self.pairs.drive(model)
        if resume_from_checkpoint:
            self._restore(Path(resume_from_checkpoint), model)
        return model, loader

    def _confirm_optimizer(self) -> None:
        """RuntimeError if an engine has put another optimizer, or other learning rates, in the method's place."""
        moving = self.moving()
        found = [(type(moving).__name__, group.get("initial_lr", group["lr"])) for group in moving.param_groups]
        if found != self.wanted:
            raise RuntimeError(f"training would move by {found}, and the method asks for {self.wanted}")
        if isinstance(moving, PairOptimizer):
            moving.check_whole()
        self.found |= {
            "optimizer": type(moving).__name__,
            "learning_rates": [lr for _, lr in found],
            "micro_batch": self.args.per_device_train_batch_size,
            "accumulation": self.args.gradient_accumulation_steps,
        }

    # Batches and loss

    def get_train_dataloader(self) -> DataLoader:
        rows = self.train_dataset
        assert isinstance(rows, EncodedRows)
        lengths = rows.lengths() if self.settings.length_bucketed else [0] * len(rows)
        order = LengthBucketSampler(lengths, self.settings.global_batch_size, self.data_seed)
        batches = RankBatches(order, self.args.per_device_train_batch_size, rank(), world_size())
        return _Batches(
            WithBlank(rows),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Scored tokens of the global batch; Trainer would count one label too few, as ours are shifted already.

        Counts what is read as well, for the curve; blank rows score nothing and do not count.
        """
        counts = torch.zeros(2, dtype=torch.int64)
        for batch in batch_samples:
            scored = batch["labels"] != IGNORED  # (batch, length)
            real = scored.any(dim=1, keepdim=True)  # (batch, 1)
            counts += torch.stack([scored.sum(), (batch["attention_mask"] * real).sum()])
        scored_tokens, read = sum_over_ranks(counts.to(device))
        self.tokens += int(read)
        return scored_tokens

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        logits, labels = scored_logits(model, inputs, self.settings.autocast_dtype, head=self.model)
        loss = F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        value = sum_over_ranks(loss.detach().clone()).item()
        if not math.isfinite(value):
            raise Diverged(f"the loss was {value} at step {self.state.global_step + 1}", self.curve)
        self._step_loss += value
        assert isinstance(self.model, nn.Module)
        penalty = self.method.penalty(self.model)
        if penalty is not None:
            loss = loss + penalty / self.current_gradient_accumulation_steps / world_size()
        return loss * world_size()  # engines average over ranks what is meant to be a sum

    @property
    def watched(self) -> Alignment | None:
        """What measures the step at work, if it is one to measure: the first, and then as settings say."""
        every, step = self.settings.alignment_every, self.state.global_step + 1
        return self.alignment if every and (step == 1 or step % every == 0) else None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        with self.watched.micro_batch() if self.watched else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    def measure(self) -> None:
        """After the parameters have moved, before the step counts as done."""
        if self.watched:
            self._measured, seconds = self.watched.measured()
            self.began += seconds  # seconds are training's own

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            row = {
                "step": self.state.global_step,
                "loss": self._step_loss,
                "learning_rate": logs["learning_rate"],
                "grad_norm": float(logs.get("grad_norm", math.nan)) if self.engine_clips else self._own_norm,
                "tokens": self.tokens,
                "seconds": round(time.perf_counter() - self.began, 3),
                **self._measured,
            }
            self.curve.append({key: value for key, value in row.items() if math.isfinite(value)})
            self._measured = {}
            every, step = self.settings.held_out_every, self.state.global_step
            if self.held_out and every and (step % every == 0 or step == self.state.max_steps):
                paused = time.perf_counter()
                self.curve[-1]["held_out_loss"] = self.held_out()
                self.began += time.perf_counter() - paused  # seconds are training's own
            logs["loss"], self._step_loss = self._step_loss, 0.0
        super().log(logs, start_time)

    # Checkpoints

    @property
    def _optimizer_file(self) -> str | None:
        """Name of the file of this rank's optimizer state; None where DeepSpeed's own files hold it."""
        if isinstance(self.moving(), PairOptimizer):
            return f"optimizer-{rank()}.pt"  # each rank has moments of its own pairs
        return None if self.engine.flattens else "optimizer.pt"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """In place of transformers': called after the step's row is in the curve."""
        assert isinstance(self.model, nn.Module)
        paused = time.perf_counter()
        writer = checkpoints.Writer(self.resume.folder, self.state.global_step)
        if self.engine.flattens:
            model.save_checkpoint(str(writer.folder), exclude_frozen_parameters=True)  # type: ignore[operator]
        else:
            writer.tensors("parameters", trainable(self.model))
        if self._optimizer_file:
            writer.state(self._optimizer_file, self.moving().state_dict())
        writer.tensors("start", offset_factors(self.model))
        writer.state("schedule.pt", self.lr_scheduler.state_dict())  # type: ignore[union-attr]
        writer.state("method.pt", self.method.state(self.model))
        writer.state(checkpoints.random_file(), checkpoints.random_state())
        if is_main():
            self.state.save_to_json(str(writer.folder / TRAINER_STATE))
        writer.close(
            {
                "step": self.state.global_step,
                "identity": dict(self.resume.identity),
                "curve": self.curve,
                "tokens": self.tokens,
                "seconds": time.perf_counter() - self.began,
            }
        )
        self.began += time.perf_counter() - paused

    @torch.no_grad()
    def _restore(self, checkpoint: Path, model: nn.Module) -> None:
        """Everything but the random state, which transformers asks for when the data are in place."""
        assert isinstance(self.model, nn.Module)
        if self.engine.flattens:
            path, _ = model.load_checkpoint(str(checkpoint), load_module_strict=False)  # type: ignore[operator]
            if path is None:
                raise RuntimeError(f"DeepSpeed found nothing to load in {checkpoint}")
        else:
            trained = trainable(self.model)
            kept = checkpoints.load_tensors(checkpoint, "parameters", {n: p.shape for n, p in trained.items()})
            for name, parameter in trained.items():
                parameter.copy_(kept[name])
        if self._optimizer_file:
            state = torch.load(checkpoint / self._optimizer_file, map_location="cpu", weights_only=True)
            self.moving().load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(checkpoint / "schedule.pt", weights_only=True))  # type: ignore[union-attr]
        self.method.load_state(self.model, torch.load(checkpoint / "method.pt", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Not yet: `_restore` does it when engine and optimizer exist."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_random_state(Path(checkpoint))


class AfterStep(TrainerCallback):
    """Calls the method after each optimizer step, asks for checkpoints, moves a progress bar instead of printing."""

    def __init__(self, trainer: MethodTrainer, steps: int, done: int) -> None:
        self.trainer = trainer
        self.bar = tqdm(total=steps, initial=done, desc="train", unit="step", disable=not is_main())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.measure()
        self.trainer.method.after_step(kwargs["model"], state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        resume, step = self.trainer.resume, state.global_step
        if step < state.max_steps and any_rank(resume.stop()):
            self.trainer.stopped = control.should_save = control.should_training_stop = True
        elif resume.every and step % resume.every == 0 and step < state.max_steps:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "learning_rate" in kwargs["logs"]:
            self.bar.set_postfix(loss=f"{kwargs['logs']['loss']:.3f}", refresh=False)
            self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
