"""The pieces of one run that need more than a line: the one-step gradient, the training, the record's frame."""

from __future__ import annotations

import ctypes
import datetime
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
from experiments.tracking import tracked
from experiments.trained import fingerprint, restore, save
from lora_ga.adapters import target_linears
from lora_ga.cache import cache_folder
from lora_ga.gradients import cached_gradients, estimate_gradients
from lora_ga.losses import held_out_loss, mean_token_loss, scored_logits
from lora_ga.models import Loaded
from lora_ga.records import RunRecord, capture_environment, content_hash, record_name, write_record
from lora_ga.training import Diverged, adapter_report, train

DROPOUT_SEED = 0  # of the one-step gradient; with the run's own seed every run would estimate anew
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc malloc.h


@dataclass
class Gradients:
    """The one-step gradient of a run: estimated (or read from the cache) when a method asks; `report` says how."""

    config: RunConfig
    loaded: Loaded
    encoded: Encoded
    report: dict[str, Any] = field(default_factory=dict)

    def batches(self) -> list[dict[str, torch.Tensor]]:
        """The first batch_size x batches training rows, unshuffled, as in the papers' code."""
        settings = self.config.gradient
        size = settings.batch_size
        taken = self.encoded.train.rows[: size * settings.batches]
        return [self.encoded.collator(taken[i : i + size]) for i in range(0, len(taken), size)]

    def __call__(self) -> dict[str, torch.Tensor]:
        config, settings = self.config, self.config.gradient
        layers = target_linears(self.loaded.model, config.model.target_modules)
        batches = self.batches()
        key = {
            "model": self.loaded.identity,
            "rows": content_hash([batch["input_ids"].tolist() + batch["labels"].tolist() for batch in batches], 24),
            "dtype": [config.model.dtype, config.train.autocast, config.model.attn_implementation],
            "batch_shape": [settings.batch_size, settings.batches],
            "dropout": settings.dropout,
            "dropout_seed": DROPOUT_SEED,
            "targets": list(layers),
            "torch": torch.__version__,
        }

        def estimate() -> dict[str, torch.Tensor]:
            return estimate_gradients(
                self.loaded.model,
                batches,
                layers,
                lambda model, batch: mean_token_loss(model, batch, config.train.autocast_dtype),
                seed=DROPOUT_SEED,
                dropout=settings.dropout,
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


def train_once(config: RunConfig, record: RunRecord, model: torch.nn.Module, encoded: Encoded) -> None:
    """Train, or take the same training's kept parameters; curve, costs and adapters go into the record."""
    settings = config.train

    def held_out() -> float:
        rows = encoded.held_out[: settings.held_out_rows]
        size, autocast = config.eval.batch_size, settings.autocast_dtype
        return held_out_loss(model, rows, encoded.collator, batch_size=size, autocast=autocast)

    keep = config.outputs / "trained" / config.train_id if config.benchmarks else None
    start = fingerprint(model) if keep else ""
    if keep and restore(keep, model, record, start):
        return
    if encoded.held_out:
        record.step0["held_out_loss"] = held_out()
    result, moved = train(
        model,
        encoded.train,
        encoded.collator,
        config.method,
        settings,
        output_dir=config.outputs / config.run_id,
        seed=config.seeds.data,
        held_out=held_out if encoded.held_out else None,
    )
    record.loss_curve, record.adapters = result.loss_curve, {**moved, **adapter_report(model)}
    record.cost |= {
        "train_seconds": result.seconds,
        "trainable_parameters": result.trainable_parameters,
        "optimizer_state_mb": result.optimizer_state_mb,
        "peak_memory_mb": peak_memory_mb(),
    }
    if keep:
        save(keep, model, record, start)


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
def finish(config: RunConfig, record: RunRecord) -> Iterator[Path]:
    """Whatever happens inside, write the record; a failure is recorded, told in one line and ends with code 1.

    An interrupted run (ctrl-C, SIGTERM) leaves no record, so that the next sweep starts it again.
    """
    path = config.records_folder / record_name(record.task, record.method, record.seed, record.run_id)
    with tracked(config, record):
        try:
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
