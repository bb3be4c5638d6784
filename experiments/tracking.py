"""A copy of the run on Weights & Biases: offline by default, id = run id, group = experiment.

A run that was stopped and started again stays one W&B run: what an earlier process has sent is not sent again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.config import RunConfig
from lora_ga.errors import SetupError
from lora_ga.records import RunRecord, write_atomic


@contextmanager
def tracked(config: RunConfig, record: RunRecord) -> Iterator[None]:
    """Send what the record holds when the process ends, well or badly; nothing for logger=none or from other ranks."""
    if config.logger.name == "none" or os.environ.get("RANK", "0") != "0":
        yield
        return
    run = _begin(config, record)
    sent = config.outputs / "wandb" / f"sent-{record.run_id}"
    try:
        yield
    except BaseException:  # told to stop; what goes wrong in a run is in its record by now
        run.mark_preempting()
        raise
    finally:
        try:
            last = _send(run, record, after=max(_step(sent), run.starting_step - 1))
        finally:
            run.finish(exit_code=0 if record.status == "finished" else 1)
        write_atomic(sent, str(last))


def _begin(config: RunConfig, record: RunRecord) -> Any:
    import wandb  # a second to import, and only this logger needs it

    settings = config.logger
    try:
        return wandb.init(
            id=record.run_id,
            name=f"{record.task}-{record.method}-seed{record.seed}",
            project=settings.project,
            entity=settings.entity,
            group=f"{config.experiment_name}-{config.scale}",
            job_type="train",
            mode=os.environ.get("WANDB_MODE") or settings.mode,  # type: ignore[arg-type]  # W&B checks it
            dir=str(config.outputs),
            resume="allow",
            config=dict(config.resolved),
        )
    except wandb.Error as error:
        raise SetupError(
            f"W&B: {' '.join(str(error).split())}; use logger.mode=offline and upload later with make wandb-sync"
        ) from error


def _step(path: Path) -> int:
    """The step that a process before this one sent last, -1 if none did."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return -1


def _send(run: Any, record: RunRecord, after: int) -> int:
    """Log the curve's steps beyond `after` and the summary; returns the last step that W&B has now."""
    for row in record.loss_curve:
        if row["step"] > after:
            run.log({f"train/{key}": value for key, value in row.items() if key != "step"}, step=int(row["step"]))
            after = int(row["step"])
    summary: dict[str, Any] = {f"eval/{name}": cell["value"] for name, cell in record.metrics.items()}
    run.summary.update({**summary, **{f"cost/{k}": v for k, v in record.cost.items()}, "status": record.status})
    return after
