"""What a report reads: the records of an experiment and the plan in conf/experiment."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.report.columns import unit
from lora_ga.records import RunRecord, read_record

log = logging.getLogger(__name__)
STATUSES = ("finished", "failed", "diverged")


@dataclass(frozen=True)
class Entry:
    """A record, the name of its file and the folder that holds it."""

    file: str
    record: RunRecord
    folder: Path = Path()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the task's metrics, the headline metric first; none of a benchmark eval.benchmarks leaves out."""
        config = self.record.config
        names = (config["task"]["metric"], *(config["task"].get("also") or ()))
        chosen = (config.get("eval") or {}).get("benchmarks")
        return tuple(name for name in names if chosen is None or "/" not in name or name.partition("/")[0] in chosen)

    @property
    def finished(self) -> bool:
        return self.record.status == "finished"

    def shown(self, metric: str) -> float | None:
        """A metric in the unit it is printed in; None if the run has no such metric."""
        value = self.record.metrics.get(metric, {}).get("value")
        return None if value is None else unit(metric).factor * value

    @property
    def judge(self) -> Mapping[str, Any]:
        """What the record says of the judge that gave its grades; empty if there was none."""
        settings = (self.record.config.get("eval") or {}).get("judge") or {}
        return {**settings, **(self.record.data.get("judge") or {})}


@dataclass(frozen=True)
class Plan:
    """What conf/experiment/<name>.yaml asks for: tasks with their metrics, learning rates by method, footnotes."""

    tasks: Mapping[str, tuple[str, ...]]
    rates: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()  # under which every trained model is scored, where there are several
    search: str | None = None  # the experiment whose validation runs chose the learning rates


NO_PLAN = Plan({}, {})


def _check(entry: Entry, experiment: str, scale: str) -> None:
    record = entry.record
    if (record.experiment, record.scale) != (experiment, scale):
        raise ValueError(f"it belongs to {record.experiment}-{record.scale}")
    if record.status not in STATUSES:
        raise ValueError(f"unknown status {record.status!r}")
    try:
        values = [entry.shown(metric) for metric in entry.metrics]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no metric in its task ({error})") from error
    known = [value for value in values if value is not None]
    if entry.finished and not known:
        raise ValueError(f"finished without any of its task's metrics: {', '.join(entry.metrics)}")
    if not all(map(math.isfinite, known)):
        raise ValueError("a metric is not finite")


def read_entries(folder: Path, experiment: str, scale: str) -> tuple[list[Entry], list[str]]:
    """The usable records in `folder`, or in its subfolder `records`, and the names of the files left out."""
    files = sorted(folder.glob("*.json")) or sorted((folder / "records").glob("*.json"))
    entries, skipped = [], []
    for path in files:
        try:
            entry = Entry(path.name, read_record(path), path.parent)
            _check(entry, experiment, scale)
        except ValueError as error:
            log.warning("left out %s: %s", path, error)
            skipped.append(path.name)
        else:
            entries.append(entry)
    return entries, skipped


def _yaml(path: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(path))


def _planned_metrics(path: Path) -> tuple[str, ...]:
    """The metrics that conf/task/<task>.yaml names, none if there is no such file."""
    try:
        task = _yaml(path)
        return (task["metric"], *(task.get("also") or ()))
    except (OSError, KeyError, TypeError, OmegaConfBaseException):
        return ()


def read_plan(path: Path, scale: str) -> Plan:
    """The plan of one scale; an absent file, an absent scale or a file of another form plans nothing."""
    try:
        table = _yaml(path)[scale]
        rates = {name: tuple(map(float, settings["learning_rate"])) for name, settings in table["methods"].items()}
        tasks = {task: _planned_metrics(path.parents[1] / "task" / f"{task}.yaml") for task in table["tasks"]}
        notes, protocols = tuple(table.get("notes", ())), tuple(table.get("scored_under", ()))
        return Plan(tasks, rates, notes, protocols, table.get("search"))
    except (OSError, KeyError, TypeError, OmegaConfBaseException):
        return NO_PLAN
