"""What a report reads: the records of an experiment, the plan in conf/experiment, the papers' numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_ga.records import RunRecord, read_record

log = logging.getLogger(__name__)
STATUSES = ("finished", "failed", "diverged")


@dataclass(frozen=True)
class Entry:
    """A record and the name of its file."""

    file: str
    record: RunRecord

    @property
    def metric(self) -> str:
        """Name of the task's headline metric."""
        return self.record.config["task"]["metric"]

    @property
    def finished(self) -> bool:
        return self.record.status == "finished"

    @property
    def percent(self) -> float:
        """The headline metric of a finished run, in percent."""
        return 100 * self.record.metrics[self.metric]["value"]


@dataclass(frozen=True)
class Plan:
    """Tasks and learning rates by method that conf/experiment/<name>.yaml asks for, and its footnotes; else empty."""

    tasks: tuple[str, ...]
    rates: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublishedRow:
    """A row of a paper's table: `cells` maps our task names, and "average", to (mean, std)."""

    method: str
    title: str
    cells: Mapping[str, tuple[float | None, float | None]]
    source: tuple[str, ...]
    from_memory: bool
    confidence: float
    note: str


def _check(entry: Entry, experiment: str, scale: str) -> None:
    record = entry.record
    if (record.experiment, record.scale) != (experiment, scale):
        raise ValueError(f"it belongs to {record.experiment}-{record.scale}")
    if record.status not in STATUSES:
        raise ValueError(f"unknown status {record.status!r}")
    try:
        value = entry.percent if entry.finished else len(entry.metric)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no headline metric ({error})") from error
    if not math.isfinite(value):
        raise ValueError("its headline metric is not finite")


def read_entries(folder: Path, experiment: str, scale: str) -> tuple[list[Entry], list[str]]:
    """The usable records in `folder`, or in its subfolder `records`, and the names of the files left out."""
    files = sorted(folder.glob("*.json")) or sorted((folder / "records").glob("*.json"))
    entries, skipped = [], []
    for path in files:
        try:
            entry = Entry(path.name, read_record(path))
            _check(entry, experiment, scale)
        except ValueError as error:
            log.warning("left out %s: %s", path, error)
            skipped.append(path.name)
        else:
            entries.append(entry)
    return entries, skipped


def _yaml(path: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(path))


def read_plan(path: Path, scale: str) -> Plan:
    """The plan of one scale; an absent file, an absent scale or a file of another form plans nothing."""
    try:
        table = _yaml(path)[scale]
        rates = {name: tuple(map(float, settings["learning_rate"])) for name, settings in table["methods"].items()}
        return Plan(tuple(table["tasks"]), rates, tuple(table.get("notes", ())))
    except (OSError, KeyError, TypeError, OmegaConfBaseException):
        return Plan((), {})


def read_published(path: Path, experiment: str) -> tuple[list[PublishedRow], dict[str, str]]:
    """Rows printed for an experiment and one of our methods, and what the source keys mean."""
    content = _yaml(path)
    rows = []
    for table in content["tables"].values():
        if table["experiment"] != experiment:
            continue
        tasks = table["columns"]
        for row in table["rows"].values():
            # A rank of its own makes a row that our methods, all at the table's rank, must not stand beside.
            if row["method"] is None or "rank" in row:
                continue
            cells = {tasks[column]: (cell["mean"], cell["std"]) for column, cell in row["cells"].items()}
            rows.append(
                PublishedRow(
                    row["method"],
                    table["title"],
                    cells,
                    tuple(row["source"]),
                    row["from_memory"],
                    row["confidence"],
                    row.get("note", ""),
                )
            )
    return rows, content["sources"]
