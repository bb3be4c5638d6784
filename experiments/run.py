"""One run, from configuration to record: `python -m experiments.run task=movies method=lora_ga seed=0`.

This page is the definition of an experiment. Every group of conf/ is a choice; the last line printed is the record.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from experiments.config import CONF, RunConfig, load_config, one_line_errors, parse, resolve
from experiments.stages import Gradients, Rows, at_start, begin_record, encoded_rows, finish, keep_freed_memory, score
from lora_ga.methods.base import Setup
from lora_ga.models import load_model, target_shapes
from lora_ga.records import RunRecord
from lora_ga.training import adapter_report, check_start, train


def execute(config: RunConfig, record: RunRecord, rows: Rows) -> None:
    """Load, start, train, score; what is learnt on the way goes into the record as it comes."""
    clock = time.perf_counter()
    loaded = load_model(config.model)
    ids, collator, decoder_start = encoded_rows(config, loaded, rows)
    gradients = Gradients(config, loaded, ids, collator)
    probe = gradients.batches()[0]
    before, loss_before = at_start(config, loaded.model, probe)

    started = time.perf_counter()
    setup = Setup(
        target_modules=config.model.target_modules,
        gradients=gradients,
        seed=config.seeds.adapter,
        total_steps=config.train.total_steps(len(ids)),
        full_precision=config.train.autocast is None,
    )
    model = config.method.prepare(loaded.model, setup)
    record.cost["init_seconds"] = time.perf_counter() - started
    record.gradients = gradients.report
    after, loss_after = at_start(config, model, probe)
    record.step0 = {**check_start(config.method, before, after), "loss_before": loss_before, "loss_after": loss_after}

    output = config.outputs / config.run_id
    result, moved = train(model, ids, collator, config.method, config.train, output_dir=output, seed=config.seeds.data)
    record.loss_curve, record.adapters = result.loss_curve, {**moved, **adapter_report(model)}
    record.cost |= {
        "train_seconds": result.seconds,
        "trainable_parameters": result.trainable_parameters,
        "optimizer_state_mb": result.optimizer_state_mb,
    }
    started = time.perf_counter()
    record.metrics = score(config, model, loaded.tokenizer, rows, decoder_start)
    record.cost["eval_seconds"] = time.perf_counter() - started
    record.cost["total_seconds"] = time.perf_counter() - clock
    if config.export:
        config.method.export(model, output / "export")


def run(config: RunConfig) -> Path:
    """Refuse what cannot work, then execute and leave a record whatever happens; returns the record's path."""
    config.method.check(target_shapes(config.model))
    rows = Rows.load(config)
    record = begin_record(config, rows)
    with finish(config, record) as path:
        execute(config, record, rows)
    return path


@hydra.main(version_base=None, config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    """Command line; a setting that cannot work ends with one line and code 2, a run that fails with code 1."""
    keep_freed_memory()
    with one_line_errors():
        path = run(parse(resolve(composed)))
        print(path, flush=True)


if __name__ == "__main__":
    with one_line_errors():
        if not any(argument.startswith("-") for argument in sys.argv[1:]):
            load_config(sys.argv[1:])  # Hydra's own refusals take several lines
    main()
