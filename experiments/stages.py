"""The pieces of one run that need more than a line: rows, the one-step gradient, the scoring, the record's frame."""

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

from eval.base import classification_metrics
from eval.glue import classify
from experiments.config import RunConfig
from experiments.tracking import tracked
from lora_ga.adapters import target_linears
from lora_ga.cache import cache_folder
from lora_ga.data.encoding import Collator, EncodedRows, encode_rows
from lora_ga.data.tasks import Example, TaskData, load_task, render
from lora_ga.errors import SetupError
from lora_ga.gradients import cached_gradients, estimate_gradients
from lora_ga.losses import mean_token_loss, scored_logits
from lora_ga.models import Loaded
from lora_ga.records import RunRecord, capture_environment, content_hash, record_name, write_record
from lora_ga.training import Diverged

DROPOUT_SEED = 0  # of the one-step gradient; with the run's own seed every run would estimate anew
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc malloc.h


@dataclass(frozen=True)
class Rows:
    """A task's training rows as (prompt, target) and the rows to score."""

    data: TaskData
    train: list[tuple[str, str]]
    scored: list[Example]
    scored_prompts: list[str]

    @classmethod
    def load(cls, config: RunConfig) -> Rows:
        """Read the task and put the protocol's prompt around each row."""
        task = config.task
        data = load_task(task.source, task.name, sizes=task.sizes, data_root=task.data_root)
        template, words, labels = config.prompt.template, config.prompt.labels, len(data.labels)
        scored = list(data.splits[config.eval.split])[: config.eval.limit]
        for split in ("train", config.eval.split):
            if not data.splits[split]:
                raise SetupError(f"task={task.name} has no {split} rows: set task.sizes.{split} to a number, or null")
        return cls(
            data=data,
            train=[render(template, words, row, label_count=labels) for row in data.splits["train"]],
            scored=scored,
            scored_prompts=[render(template, words, row, label_count=labels)[0] for row in scored],
        )

    def describe(self, config: RunConfig) -> dict[str, Any]:
        """What the record says of the data."""
        gold = [row.label for row in self.scored]
        return {
            "train": {"n": len(self.train), "sha256": self.data.fingerprint("train")},
            "scored": {
                "split": config.eval.split,
                "n": len(gold),
                "of": len(self.data.splits[config.eval.split]),
                "sha256": self.data.fingerprint(config.eval.split),
            },
            "majority_rate": max(gold.count(label) for label in set(gold)) / len(gold),
            "labels": list(config.prompt.labels),
            "notes": list(self.data.notes),
        }


@dataclass
class Gradients:
    """The one-step gradient of a run: estimated (or read from the cache) when a method asks; `report` says how."""

    config: RunConfig
    loaded: Loaded
    rows: EncodedRows
    collator: Collator
    report: dict[str, Any] = field(default_factory=dict)

    def batches(self) -> list[dict[str, torch.Tensor]]:
        """The first batch_size x batches training rows, unshuffled, as in the papers' code."""
        settings = self.config.gradient
        size = settings.batch_size
        taken = self.rows.rows[: size * settings.batches]
        return [self.collator(taken[i : i + size]) for i in range(0, len(taken), size)]

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


def score(config: RunConfig, model: torch.nn.Module, tokenizer: Any, rows: Rows, start: int | None) -> dict[str, Any]:
    """Metrics on the rows to score, each with the number of rows behind it."""
    gold = [row.label for row in rows.scored]
    result = classify(
        model,
        tokenizer,
        rows.scored_prompts,
        config.prompt.labels,
        gold,
        architecture=config.model.architecture,
        max_length=config.task.max_length,
        batch_size=config.eval.batch_size,
        autocast=config.train.autocast_dtype,
        decoder_start_token_id=start,
    )
    return classification_metrics(result, gold, len(config.prompt.labels))


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


def encoded_rows(config: RunConfig, loaded: Loaded, rows: Rows) -> tuple[EncodedRows, Collator, int | None]:
    """Training rows as ids, the collator of this architecture, and T5's first decoder token."""
    start = getattr(loaded.model.config, "decoder_start_token_id", None)
    kind = config.model.architecture
    ids = encode_rows(loaded.tokenizer, rows.train, kind, config.task.max_length)
    return EncodedRows(ids), Collator(kind, loaded.tokenizer.pad_token_id, start), start


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
        protocol=config.protocol.name,
        protocol_hash=config.protocol_hash,
        method=config.method_name,
        seed=config.seed,
        learning_rate=config.train.learning_rate,
        config=dict(config.resolved),
        environment=capture_environment(),
        data=rows.describe(config),
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
        record.cost["peak_memory_mb"] = peak_memory_mb()
        record.finished_at = _now()
        write_record(record, path)
    if record.status != "finished":
        raise SystemExit(f"{record.status}: {record.error} (record: {path})")
