"""One training: its run on any engine, and the checks that it did what it was meant to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from lora_ga import checkpoints
from lora_ga.adapters import adapter_pairs, has_offset, move_offset, offset_factors, trainable
from lora_ga.alignment import Alignment
from lora_ga.compilation import compiled_blocks
from lora_ga.data.encoding import Collator, EncodedRows
from lora_ga.engines import Engine, gather, whole, world_size
from lora_ga.methods.adalora import ranks
from lora_ga.methods.base import Method
from lora_ga.precast import precast
from lora_ga.train_settings import TrainSettings
from lora_ga.trainer import AfterStep, Diverged, MethodTrainer, Resume, Stopped

__all__ = ["Diverged", "Resume", "Stopped", "TrainResult", "TrainSettings", "adapter_report", "check_start", "train"]


@dataclass
class TrainResult:
    """Loss curve and cost of one training; `engine` says what held the model."""

    engine: dict[str, Any] = field(default_factory=dict)
    loss_curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    optimizer_state_mb: float = 0.0
    trainable_parameters: int = 0


def _samples(model: nn.Module) -> dict[str, torch.Tensor]:
    """A slice of every trainable tensor, small enough to keep: what `movement` compares."""
    samples = {}
    for name, parameter in trainable(model).items():
        with whole([parameter]):
            samples[name] = parameter.detach().flatten()[:4096].clone()
    return samples


def movement(before: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, Any]:
    """How many trainable tensors differ from `before`; raises RuntimeError if a lora_B, or everything, stood still."""
    now = _samples(model)
    still = [name for name, start in before.items() if torch.equal(start, now[name])]
    stuck = [name for name in still if "lora_B" in name]
    if stuck or len(still) == len(before):
        raise RuntimeError(f"training left {len(stuck or still)} tensors where they were, first {(stuck or still)[0]}")
    return {"trainable_tensors": len(before), "unmoved": len(still)}


def _arguments(
    settings: TrainSettings, engine: Engine, output_dir: Path, steps: int, seed: int, *, bf16: bool, clips: bool
) -> TrainingArguments:
    micro = settings.micro_batch(world_size())
    accumulation = settings.global_batch_size // (micro * world_size())
    max_grad_norm = settings.max_grad_norm if clips else 0.0
    deepspeed = engine.training_config(
        micro_batch=micro,
        accumulation=accumulation,
        max_grad_norm=max_grad_norm,
        bf16=bf16,
        autocast=settings.autocast is not None,
    )
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        # a value below 1 is a ratio of max_steps
        warmup_steps=settings.warmup_ratio if settings.warmup_steps is None else settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed if engine.kind == "deepspeed" else None,
    )


def _resumed_from(resume: Resume, model: nn.Module) -> Path | None:
    """The checkpoint to go on from, if there is one, with the model's frozen start moved to that training's."""
    checkpoint = checkpoints.latest(resume.folder)
    if checkpoint and has_offset(model):
        assert isinstance(model, PeftModel)
        shapes = {name: parameter.shape for name, parameter in offset_factors(model).items()}
        move_offset(model, checkpoints.load_tensors(checkpoint, "start", shapes))
    return checkpoint


def _result(trainer: MethodTrainer) -> TrainResult:
    tensors = (v for s in trainer.moving().state.values() for v in s.values() if isinstance(v, torch.Tensor))
    return TrainResult(
        engine=trainer.found,
        loss_curve=trainer.curve,
        seconds=time.perf_counter() - trainer.began,
        optimizer_state_mb=sum(t.numel() * t.element_size() for t in tensors) / 2**20,
    )


def train(
    model: nn.Module,
    rows: EncodedRows,
    collator: Collator,
    method: Method,
    settings: TrainSettings,
    *,
    seed: int,
    resume: Resume,
    engine: Engine | None = None,
    held_out: Callable[[], float] | None = None,
    alignment: Alignment | None = None,
) -> tuple[TrainResult, dict[str, Any]]:
    """Train a prepared model in place, from resume's checkpoint if there is one; returns the curve with its cost, and
    what moved. Every rank calls it, and has the whole trained model afterwards.

    `seed` orders the rows and drives dropout. `held_out` measures the loss on rows that are not trained on, `alignment`
    the step against its full gradient, at the steps that settings say. Raises Diverged when a loss is not finite,
    Stopped when resume.stop() said so and the state is on disk, SetupError for a checkpoint of another training.
    """
    engine = engine or Engine()
    checkpoint = _resumed_from(resume, model)
    done = checkpoints.read_meta(checkpoint, resume.identity) if checkpoint else {}
    before, steps = _samples(model), settings.total_steps(len(rows))
    bf16 = engine.shards_weights and any(p.dtype == torch.bfloat16 for p in model.parameters())
    clips = engine.clips(whole_matrices=method.steps.whole_matrices)  # else the trainer does
    trainer = MethodTrainer(
        model=model,
        args=_arguments(settings, engine, resume.folder, steps, seed, bf16=bf16, clips=clips),
        method=method,
        settings=settings,
        engine=engine,
        data_seed=seed,
        resume=resume,
        held_out=held_out,
        alignment=alignment,
        train_dataset=rows,
        data_collator=collator,
    )
    trainer.add_callback(AfterStep(trainer, steps, done.get("step", 0)))
    trainer.remove_callback(PrinterCallback)
    trainer.curve, trainer.tokens = done.get("curve", []), done.get("tokens", 0)
    trainer.began = time.perf_counter() - done.get("seconds", 0.0)
    # What is compiled casts inside its graphs; DeepSpeed holds the weights itself.
    copies = None if settings.compile or engine.kind == "deepspeed" else settings.autocast_dtype
    with precast(model, copies), compiled_blocks(model, settings.compile):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stopped:
        raise Stopped(f"stopped after step {trainer.state.global_step} of {steps}; the same command goes on from there")
    result = _result(trainer)
    gather(model, trainer.model_wrapped)
    result.trainable_parameters = sum(p.numel() for p in trainable(model).values())
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
