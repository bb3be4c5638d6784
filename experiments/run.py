"""One run, from configuration to record: `python -m experiments.run task=movies method=lora_ga seed=0`.

This page is the definition of an experiment. Every group of conf/ is a choice; the last line printed is the record.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import hydra
from omegaconf import DictConfig
from torch import nn

from experiments.config import CONF, RunConfig, load_config, one_line_errors, parse, require_means, resolve
from experiments.rows import Encoded, Rows
from experiments.scoring import score
from experiments.stages import Gradients, Training, at_start, begin_record, finish, keep_freed_memory
from experiments.stopping import Stopping
from lora_ga.engines import is_main, joined, require_processes, runnable
from lora_ga.methods.base import Setup
from lora_ga.models import Loaded, load_model, target_shapes
from lora_ga.records import RunRecord
from lora_ga.training import check_start


def execute(config: RunConfig, record: RunRecord, rows: Rows, stopping: Stopping) -> None:
    """Load, start, train, score; what is learnt on the way goes into the record as it comes."""
    clock = time.perf_counter()
    with joined(config.launcher):
        loaded = load_model(config.model, config.launcher)
        encoded = Encoded.of(config, loaded, rows)
        with runnable(loaded.model, config.launcher):
            model = start(config, record, loaded, encoded)
            training = Training(config, record, loaded, model, encoded)
            training.begin()
        training.run(stopping)
    if not is_main():
        return
    started = time.perf_counter()
    record.metrics = score(config, record, loaded, model, rows, encoded)
    record.cost["eval_seconds"] = time.perf_counter() - started
    record.cost["total_seconds"] = time.perf_counter() - clock
    if config.export:
        config.method.export(model, config.outputs / config.run_id / "export")


def start(config: RunConfig, record: RunRecord, loaded: Loaded, encoded: Encoded) -> nn.Module:
    """The model with the method's parameters at their start, held to what the method promises of it."""
    gradients = Gradients(config, loaded, encoded)
    probe = gradients.batches()[0][0]
    before, loss_before = at_start(config, loaded.model, probe)
    started = time.perf_counter()
    setup = Setup(
        target_modules=config.model.target_modules,
        gradients=gradients,
        seed=config.seeds.adapter,
        total_steps=config.train.total_steps(len(encoded.train)),
        full_precision=config.train.autocast is None,
    )
    model = config.method.prepare(loaded.model, setup)
    record.cost["init_seconds"] = time.perf_counter() - started
    record.gradients = gradients.report
    after, loss_after = at_start(config, model, probe)
    record.step0 = {**check_start(config.method, before, after), "loss_before": loss_before, "loss_after": loss_after}
    return model


def run(config: RunConfig) -> Path:
    """Refuse what cannot work, then execute and leave a record whatever happens; returns the record's path."""
    require_means(config)
    require_processes(config.launcher)
    config.method.check(target_shapes(config.model))
    with Stopping().listening() as stopping:
        rows = Rows.load(config)
        record = begin_record(config, rows)
        with finish(config, record) as path:
            execute(config, record, rows, stopping)
    return path


@hydra.main(version_base=None, config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    """Command line; a setting that cannot work ends with one line and code 2, a run that fails with code 1."""
    keep_freed_memory()
    with one_line_errors():
        path = run(parse(resolve(composed)))
        if is_main():
            print(path, flush=True)


if __name__ == "__main__":
    # conf/hydra/launcher/submitit_slurm.yaml is checked against the plugin's schema, which Hydra tells three times.
    warnings.filterwarnings("ignore", message=r"(?s).*validated against ConfigStore schema with the same name")
    with one_line_errors():
        if not any(argument.startswith("-") for argument in sys.argv[1:]):
            load_config(sys.argv[1:])  # Hydra's own refusals take several lines
    main()
