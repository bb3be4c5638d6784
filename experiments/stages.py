"""The pieces of one run that need more than a line: the one-step gradient, the training, the record's frame."""

from __future__ import annotations

import ctypes
import datetime
import logging
import math
import platform
import resource
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.config import RunConfig
from experiments.rows import Encoded, Rows
from experiments.stopping import Stopping
from experiments.tracking import tracked
from experiments.trained import fingerprint, restore, save
from lora_ga.adapters import target_linears
from lora_ga.alignment import Alignment
from lora_ga.cache import cache_folder
from lora_ga.checkpoints import discard
from lora_ga.engines import device, gather, is_main, largest, world_size
from lora_ga.errors import REQUEUE
from lora_ga.gradients import cached_gradients, estimate_gradients
from lora_ga.losses import held_out_loss, mean_token_loss, scored_logits
from lora_ga.low_rank import Gradient
from lora_ga.models import Loaded
from lora_ga.precast import precast
from lora_ga.records import RunRecord, capture_environment, content_hash, record_name, write_record
from lora_ga.training import Diverged, Resume, Stopped, adapter_report, train

log = logging.getLogger(__name__)

DROPOUT_SEED = 0  # of the one-step gradient; with the run's own seed every run would estimate anew
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc malloc.h


@dataclass
class Gradients:
    """The one-step gradient of a run: estimated (or read from the cache) when a method asks; `report` says how."""

    config: RunConfig
    loaded: Loaded
    encoded: Encoded
    report: dict[str, Any] = field(default_factory=dict)

    def batches(self) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
        """The first batch_size x batches training rows, unshuffled, as in the papers' code, and what each batch weighs.

        A batch that is computed in parts of rows_at_once has rows of like length in each, weighing what their scored
        tokens are of the batch's: its gradient is the same.
        """
        settings = self.config.gradient
        size, at_once = settings.batch_size, settings.rows_at_once or settings.batch_size
        rows = self.encoded.train.rows[: size * settings.batches]
        parts, shares = [], []
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            if at_once < size:
                batch = sorted(batch, key=lambda row: len(row.prompt) + len(row.target))
            scored = sum(len(row.target) for row in batch)
            for start in range(0, len(batch), at_once):
                part = batch[start : start + at_once]
                parts.append({key: value.to(device()) for key, value in self.encoded.collator(part).items()})
                shares.append(sum(len(row.target) for row in part) / scored)
        return parts, [share / math.ceil(len(rows) / size) for share in shares]

    def __call__(self, k: int) -> dict[str, Gradient]:
        config, settings = self.config, self.config.gradient
        layers = target_linears(self.loaded.model, config.model.target_modules)
        batches, shares = self.batches()
        key = {
            "model": self.loaded.identity,
            "rows": content_hash([batch["input_ids"].tolist() + batch["labels"].tolist() for batch in batches], 24),
            "dtype": [config.model.dtype, config.train.autocast, config.model.attn_implementation],
            "batch_shape": [settings.batch_size, settings.batches, settings.rows_at_once],
            "dropout": settings.dropout,
            "dropout_seed": [DROPOUT_SEED, "per batch"],
            "kept": settings.kept(k),
            "targets": list(layers),
            "torch": torch.__version__,
        }

        def estimate() -> dict[str, Gradient]:
            with precast(self.loaded.model, config.train.autocast_dtype):
                return estimate_gradients(
                    self.loaded.model,
                    batches,
                    layers,
                    lambda model, batch: mean_token_loss(model, batch, config.train.autocast_dtype),
                    seed=DROPOUT_SEED,
                    dropout=settings.dropout,
                    shares=shares,
                    accumulator=settings.accumulator(k),
                )

        gradients, cached = cached_gradients(key, cache_folder("gradients") if settings.cache else None, estimate)
        self.report = {**key, "from_cache": cached, "rows_used": sum(len(b["labels"]) for b in batches)}
        del self.report["targets"]
        return gradients


@torch.no_grad()
def at_start(config: RunConfig, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """In eval mode: float32 logits without autocast, which the promise is held to, and the loss in training's dtype."""
    training = model.training
    model.eval()
    logits, _ = scored_logits(model, batch)
    loss = float(mean_token_loss(model, batch, config.train.autocast_dtype))
    model.train(training)
    return logits, loss


def keep_freed_memory() -> None:
    """Let glibc keep what training frees at every step, or full fine-tuning faults its gradients in anew each time."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26), (M_MMAP_THRESHOLD, 2**25)):
            libc.mallopt(option, value)


def peak_memory_mb() -> float:
    """Largest resident set of this process, or on a GPU the largest allocation."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@dataclass
class Training:
    """The training of a prepared model, or the kept parameters of the same training; all goes into the record."""

    config: RunConfig
    record: RunRecord
    loaded: Loaded
    model: torch.nn.Module
    encoded: Encoded
    done: bool = False
    start: str = ""

    @property
    def keep(self) -> Path | None:
        """Where trained parameters are kept for benchmarks."""
        return self.config.outputs / "trained" / self.config.train_id if self.config.benchmarks else None

    def held_out(self) -> float:
        settings = self.config.train
        rows = self.encoded.held_out[: settings.held_out_rows]
        size, autocast = self.config.eval.batch_size, settings.autocast_dtype
        return held_out_loss(self.model, rows, self.encoded.collator, batch_size=size, autocast=autocast)

    def begin(self) -> None:
        """Take kept parameters, if this very training was done before; else measure where it starts."""
        if self.keep:
            self.start = fingerprint(self.model)
            self.done = restore(self.keep, self.model, self.record, self.start)
        if self.encoded.held_out and not self.done:
            self.record.step0["held_out_loss"] = self.held_out()

    def run(self, stopping: Stopping) -> None:
        """Train, unless it is done; a checkpoint of this training is gone on from."""
        config, record = self.config, self.record
        if self.done:
            gather(self.model)
            return
        resume = Resume(
            folder=config.outputs / "checkpoints" / config.train_id,
            every=config.checkpoint_every,
            identity={
                "train_id": config.train_id,
                "base model": self.loaded.identity,
                "training rows": record.data["train"],
                "engine": [config.launcher.kind, config.launcher.stage, world_size()],
            },
            stop=stopping,
        )
        measures = config.train.alignment_every is not None
        with stopping.at_step_ends():
            result, moved = train(
                self.model,
                self.encoded.train,
                self.encoded.collator,
                config.method,
                config.train,
                seed=config.seeds.data,
                resume=resume,
                engine=config.launcher,
                held_out=self.held_out if self.encoded.held_out else None,
                alignment=Alignment(self.model, config.model.target_modules) if measures else None,
            )
        record.environment["engine"] = result.engine
        record.loss_curve, record.adapters = result.loss_curve, {**moved, **adapter_report(self.model)}
        record.cost |= {
            "train_seconds": result.seconds,
            "trainable_parameters": result.trainable_parameters,
            "optimizer_state_mb": result.optimizer_state_mb,
            "peak_memory_mb": largest(peak_memory_mb()),
        }
        if self.keep and is_main():
            save(self.keep, self.model, record, self.start)
        discard(resume.folder)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def begin_record(config: RunConfig, rows: Rows) -> RunRecord:
    """The record of a run that is about to start; its status is "failed" until it has finished."""
    return RunRecord(
        run_id=config.run_id,
        experiment=config.experiment_name,
        scale=config.scale,
        model=config.model.name,
        task=config.task.name,
        protocol=config.scoring.name,
        protocol_hash=config.protocol_hash,
        method=config.method_name,
        seed=config.seed,
        learning_rate=config.train.learning_rate,
        config=dict(config.resolved),
        environment=capture_environment(),
        data=dict(rows.description),
        started_at=_now(),
    )


@contextmanager
def _requeued() -> Iterator[None]:
    try:
        yield
    except Stopped as stop:
        log.info("%s", stop)
        raise SystemExit(REQUEUE) from None


@contextmanager
def finish(config: RunConfig, record: RunRecord) -> Iterator[Path]:
    """Whatever happens inside, write the record; a failure is recorded, told in one line and ends with code 1.

    An interrupted run (ctrl-C, SIGTERM, SIGUSR1) leaves no record, so that the next sweep goes on with it; told to
    stop, it ends with code REQUEUE. Of several ranks the first one writes.
    """
    path = config.records_folder / record_name(record.task, record.method, record.seed, record.run_id)
    if not is_main():
        with _requeued():
            yield path
        return
    with tracked(config, record):
        try:
            with _requeued():
                yield path
            record.status = "finished"
        except Exception as error:
            if isinstance(error, Diverged):
                record.status, record.loss_curve = "diverged", error.curve
            record.error = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        record.cost.setdefault("peak_memory_mb", peak_memory_mb())
        record.finished_at = _now()
        write_record(record, path)
    if record.status != "finished":
        raise SystemExit(f"{record.status}: {record.error} (record: {path})")
