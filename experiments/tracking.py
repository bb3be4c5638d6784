"""A copy of the run on Weights & Biases: offline by default, id = run id, group = experiment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from experiments.config import RunConfig
from lora_ga.records import RunRecord


@contextmanager
def tracked(config: RunConfig, record: RunRecord) -> Iterator[None]:
    """Send what the record holds when the run ends, well or badly; nothing for logger=none."""
    if config.logger.name == "none":
        yield
        return
    import wandb  # a second to import, and only this logger needs it

    settings = config.logger
    run = wandb.init(
        id=record.run_id,
        name=f"{record.task}-{record.method}-seed{record.seed}",
        project=settings.project,
        entity=settings.entity,
        group=f"{config.experiment_name}-{config.scale}",
        job_type="train",
        mode=settings.mode,
        dir=str(config.outputs),
        resume="allow",
        config=dict(config.resolved),
    )
    try:
        yield
    finally:
        for row in record.loss_curve:
            run.log({f"train/{key}": value for key, value in row.items() if key != "step"}, step=int(row["step"]))
        summary: dict[str, Any] = {f"eval/{name}": cell["value"] for name, cell in record.metrics.items()}
        run.summary.update({**summary, **{f"cost/{k}": v for k, v in record.cost.items()}, "status": record.status})
        run.finish(exit_code=0 if record.status == "finished" else 1)
