"""The metrics of a trained model: label words by likelihood, or the held-out loss and the task's benchmarks."""

from __future__ import annotations

import time

from torch import nn

from eval.base import classification_metrics
from eval.glue import classify
from experiments.benchmarks import run_benchmarks
from experiments.config import RunConfig
from experiments.rows import Encoded, Rows
from lora_ga.losses import held_out_loss
from lora_ga.models import Loaded
from lora_ga.records import RunRecord

Metrics = dict[str, dict[str, float]]


def score(
    config: RunConfig, record: RunRecord, loaded: Loaded, model: nn.Module, rows: Rows, encoded: Encoded
) -> Metrics:
    """Every metric with the number of rows behind it; how answers were made and read goes into record.data."""
    if config.task.kind == "classification":
        return _classified(config, record, loaded, model, rows, encoded)
    loss = held_out_loss(
        model,
        encoded.held_out,
        encoded.collator,
        batch_size=config.eval.batch_size,
        autocast=config.train.autocast_dtype,
    )
    metrics = {"held_out_loss": {"value": loss, "n": len(encoded.held_out)}}
    return metrics | run_benchmarks(config, record, loaded, model)


def _classified(
    config: RunConfig, record: RunRecord, loaded: Loaded, model: nn.Module, rows: Rows, encoded: Encoded
) -> Metrics:
    started = time.perf_counter()
    result = classify(
        model,
        loaded.tokenizer,
        [prompt for prompt, _ in rows.scored],
        config.prompt.labels,
        rows.gold,
        architecture=config.model.architecture,
        max_length=config.task.max_length,
        batch_size=config.eval.batch_size,
        autocast=config.train.autocast_dtype,
        decoder_start_token_id=encoded.collator.decoder_start_token_id,
    )
    record.cost["classified_rows_per_second"] = len(rows.gold) / (time.perf_counter() - started)
    return classification_metrics(result, rows.gold, len(config.prompt.labels))
