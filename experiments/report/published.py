"""The papers' numbers, results/published.yaml: every cell with its source and how much we trust it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.report.columns import Column

# What a column of a paper's table measures; the other columns, GLUE's, are accuracy in every table we hold.
PRINTED = {
    "MT-Bench": "mt_bench/first_turn",
    "HumanEval": "humaneval/pass@1",
    "GSM8K": "gsm8k/exact_match",
    "GSM8K direct": "gsm8k/exact_match",
    "epoch 4": "gsm8k/exact_match",
}
AVERAGE = Column("average", "")
TARGET = 0.9  # confidence from which a verdict may rest on a number
RANK = 8  # of every table's rows, unless a row says otherwise


@dataclass(frozen=True)
class Printed:
    """One printed number; mean None: not printed, or not known to us."""

    mean: float | None
    std: float | None
    source: tuple[str, ...]
    from_memory: bool
    std_from_memory: bool
    confidence: float

    @property
    def is_target(self) -> bool:
        """Whether a verdict may rest on it."""
        return self.mean is not None and not self.from_memory and self.confidence >= TARGET


@dataclass(frozen=True)
class PaperRow:
    """A row as the paper prints it; `method` is None where we have none of the kind."""

    name: str
    method: str | None
    rank: int
    cells: Mapping[str, Printed]
    source: tuple[str, ...]
    from_memory: bool
    confidence: float
    note: str
    repeated: bool  # from another table


@dataclass(frozen=True)
class PaperTable:
    """A table as the paper prints it; `columns` maps its headings to ours, None where we measure no such thing."""

    key: str
    title: str
    paper: str
    metric: str
    note: str
    models: tuple[str, ...]
    protocol: str | None
    seeds: int | None
    experiments: tuple[str, ...]
    beside: tuple[str, ...]  # experiments whose own table shows its rows
    columns: Mapping[str, Column | None]
    rows: tuple[PaperRow, ...]


@dataclass(frozen=True)
class PublishedRow:
    """A printed row for an experiment's own table: our columns, and Column("average", "")."""

    method: str
    title: str
    cells: Mapping[Column, Printed]
    source: tuple[str, ...]
    from_memory: bool
    confidence: float
    note: str


def _printed(cell: Mapping[str, Any], row: Mapping[str, Any]) -> Printed:
    own = {**row, **cell}
    memory = bool(own["from_memory"])
    return Printed(
        cell["mean"],
        cell["std"],
        tuple(own["source"]),
        memory,
        memory or bool(cell.get("std_from_memory")),
        float(own["confidence"]),
    )


def _row(name: str, row: Mapping[str, Any], tables: Mapping[str, Any]) -> PaperRow:
    cells = row.get("cells")
    if cells is None:  # it repeats another table's numbers, with the trust of this row
        table, _, original = row["same_as"].partition("/")
        cells = tables[table]["rows"][original]["cells"]
    return PaperRow(
        name,
        row["method"],
        row.get("rank", RANK),
        {heading: _printed(cell, row) for heading, cell in cells.items()},
        tuple(row["source"]),
        row["from_memory"],
        row["confidence"],
        row.get("note", ""),
        "same_as" in row,
    )


def _column(heading: str, task: str | None) -> Column | None:
    if task is None:
        return None
    return AVERAGE if task == AVERAGE.task else Column(task, PRINTED.get(heading, "accuracy"))


def read_tables(path: Path) -> tuple[list[PaperTable], dict[str, str]]:
    """Every table of the file in its order, and what the source keys mean."""
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    tables = [
        PaperTable(
            key,
            table["title"],
            table["paper"],
            table["metric"],
            table.get("note", ""),
            tuple(table.get("models", ())),
            table.get("protocol"),
            table["seeds"],
            tuple(table.get("records", table["experiment"])),
            tuple(table["experiment"]),
            {heading: _column(heading, task) for heading, task in table["columns"].items()},
            tuple(_row(name, row, content["tables"]) for name, row in table["rows"].items()),
        )
        for key, table in content["tables"].items()
    ]
    return tables, content["sources"]


def read_published(path: Path, experiment: str) -> tuple[list[PublishedRow], dict[str, str]]:
    """Rows printed for an experiment and one of our methods at the tables' own rank, and what the source keys mean."""
    tables, sources = read_tables(path)
    rows = [
        PublishedRow(
            row.method,
            table.title,
            {column: row.cells[name] for name, column in table.columns.items() if column and name in row.cells},
            row.source,
            row.from_memory,
            row.confidence,
            row.note,
        )
        for table in tables
        if experiment in table.beside
        for row in table.rows
        if row.method is not None and row.rank == RANK and not row.repeated
    ]
    return rows, sources


def differing(
    tables: Iterable[PaperTable],
) -> dict[tuple[str, int, Column], list[tuple[PaperTable, PaperRow, Printed]]]:
    """Cells that several tables print for the same method, rank and column, with unlike means."""
    found: dict[tuple[str, int, Column], list[tuple[PaperTable, PaperRow, Printed]]] = {}
    for table in tables:
        for row in table.rows:
            for heading, column in table.columns.items():
                cell = row.cells.get(heading)
                if row.method and column and cell and cell.mean is not None and not row.repeated:
                    known = found.setdefault((row.method, row.rank, column), [])
                    if (table.paper, cell.mean) not in [(other.paper, same.mean) for other, _, same in known]:
                        known.append((table, row, cell))
    return {key: cells for key, cells in found.items() if len({cell.mean for _, _, cell in cells}) > 1}
