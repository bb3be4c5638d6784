"""A paper's table beside our runs at its scale: under its own protocol, and under the common one with a tuned rate.

A verdict rests on a number only where more than memory vouches for it, and only where ours was measured alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from experiments.report.columns import PERCENT, Column, Unit
from experiments.report.grid import TASKS, Cell, Row, rank, rate_text
from experiments.report.loading import Entry, read_entries
from experiments.report.published import AVERAGE, PaperRow, PaperTable, Printed
from experiments.report.statistics import Difference, Summary, contains_zero, to_published
from experiments.report.tables import status
from experiments.report.tuning import on_validation, searches

WITHIN, OUTSIDE, NOT_COMPARABLE, NOT_RUN = "within interval", "outside", "not comparable", "not run"
TUNED = "_tuned"  # experiments of this ending hold the search and the runs at its choice, under the common protocol
COMMON = "common"


@dataclass(frozen=True)
class Library:
    """The papers' tables, and the records at their scale by experiment."""

    tables: Sequence[PaperTable]
    sources: Mapping[str, str]
    entries: Mapping[str, Sequence[Entry]]
    skipped: Sequence[str]

    @property
    def shown(self) -> list[PaperTable]:
        """The tables that have a protocol here, in the file's order."""
        return [table for table in self.tables if table.protocol is not None]


@dataclass(frozen=True)
class Measured:
    """Our runs for one printed cell: a summary, or why there is none."""

    entries: tuple[Entry, ...] = ()
    summary: Summary | None = None
    why: str = NOT_RUN
    unit: Unit = PERCENT

    @cached_property
    def doubts(self) -> str | None:
        """Why the number is not to be held against a printed one; None if it may be."""
        settings = [entry.record.config for entry in self.entries]
        if any(entry.judge and not entry.judge.get("trusted") for entry in self.entries if _graded(entry)):
            return "judge not trusted"
        if any((config.get("eval") or {}).get("limit") is not None for config in settings):
            return "not all rows scored"
        if any((config.get("train") or {}).get("max_steps") is not None for config in settings):
            return "training cut short"
        if self.summary is not None and self.summary.std is None:
            return "one seed"
        return None


@dataclass(frozen=True)
class Verdict:
    """What can be said of one cell, why nothing can, and the difference it rests on."""

    kind: str
    why: str = ""
    difference: Difference | None = None


@dataclass(frozen=True)
class PaperCell:
    """Three numbers and a verdict."""

    heading: str
    printed: Printed | None
    own: Measured
    tuned: Measured
    verdict: Verdict


def _graded(entry: Entry) -> bool:
    return any(name.startswith("mt_bench/") for name in entry.record.metrics)


def read_library(records: Path, tables: Sequence[PaperTable], sources: Mapping[str, str], scale: str) -> Library:
    """The papers' tables and every usable record that may stand beside them."""
    names = dict.fromkeys(name for table in tables for name in table.experiments)
    entries, skipped = {}, []
    for name in [other for each in names for other in (each, each + TUNED)]:
        entries[name], bad = read_entries(records / f"{name}-{scale}", name, scale)
        skipped += [f"{name}-{scale}/{file}" for file in bad]
    return Library(tables, sources, entries, skipped)


def _of(entries: Sequence[Entry], table: PaperTable, row: PaperRow, protocol: str) -> list[Entry]:
    """Runs of a row's method at its rank on the table's models, trained and scored under one protocol."""
    return [
        entry
        for entry in entries
        if entry.record.method == row.method
        and rank(entry) in (row.rank, None)
        and entry.record.model in table.models
        and entry.record.protocol == protocol
        and (entry.record.config.get("protocol") or {}).get("name", protocol) == protocol
    ]


def _measured(runs: Mapping[str, Sequence[Entry]], column: Column) -> Measured:
    """A summary of the runs on the column's task, or of the average over GLUE's."""
    tasks = TASKS["paper"] if column == AVERAGE else (column.task,)
    cells = [Cell(Column(task, column.metric or "accuracy"), tuple(runs.get(task, ()))) for task in tasks]
    entries = tuple(entry for cell in cells for entry in cell.entries)
    if not entries:
        return Measured(unit=column.unit)
    for cell in cells:
        if cell.repeated_seeds:
            return Measured(entries, None, f"a seed of {cell.task} more than once", column.unit)
        if len(cell.rates) > 1 or len(cell.settings) > 1:
            return Measured(entries, None, f"unlike settings on {cell.task}", column.unit)
        if cell.summary is None:
            return Measured(entries, None, f"{cell.task}: {status(cell)}", column.unit)
    by_task = {cell.column.task: cell.entries for cell in cells}
    whole = Row("", None, None, tuple(cell.column for cell in cells), by_task)
    return Measured(entries, whole.average if column == AVERAGE else cells[0].summary, "", column.unit)


def _by_task(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.record.task, []).append(entry)
    return found


def under_own_protocol(library: Library, table: PaperTable, row: PaperRow, column: Column) -> Measured:
    """Our runs under the paper's protocol, scored on test rows."""
    known = [entry for name in table.experiments for entry in library.entries[name] if not on_validation(entry)]
    return _measured(_by_task(_of(known, table, row, table.protocol or "")), column)


def tuning_runs(library: Library, table: PaperTable, name: str) -> list[Entry]:
    """The runs on validation rows that chose the rates of an experiment's tuned runs."""
    known = library.entries[name + TUNED]
    return [e for e in known if on_validation(e) and e.record.model in table.models and e.record.protocol == COMMON]


def tuned(library: Library, table: PaperTable, row: PaperRow, column: Column) -> Measured:
    """Our runs under the common protocol at the rate that the validation rows chose, scored on test rows."""
    known = [entry for name in table.experiments for entry in library.entries[name + TUNED]]
    known = _of(known, table, row, COMMON)
    chosen = {search.task: search.best for search in searches(known)}
    tasks = TASKS["paper"] if column == AVERAGE else (column.task,)
    scored = [entry for entry in known if entry.record.task in tasks and not on_validation(entry)]
    if scored and not set(tasks) <= set(chosen):
        return Measured(why="no search on validation rows", unit=column.unit)
    at_choice = [entry for entry in scored if entry.record.learning_rate == chosen[entry.record.task]]
    if scored and not at_choice:
        return Measured(why=f"not run at the chosen {rate_text(chosen[tasks[0]])}", unit=column.unit)
    return _measured(_by_task(at_choice), column)


def verdict(printed: Printed | None, own: Measured, seeds: int | None) -> Verdict:
    """Whether our mean under the paper's protocol is where the printed one says: 95 % interval of the difference."""
    if not own.entries:
        return Verdict(NOT_RUN)
    if own.summary is None:
        return Verdict(NOT_COMPARABLE, own.why)
    if printed is None or printed.mean is None:
        return Verdict(NOT_COMPARABLE, "no published number")
    if printed.from_memory:
        return Verdict(NOT_COMPARABLE, "published number from memory only")
    if not printed.is_target:
        return Verdict(NOT_COMPARABLE, f"published number uncertain ({printed.confidence:g})")
    if own.doubts:
        return Verdict(NOT_COMPARABLE, own.doubts)
    known = to_published(own.summary, printed.mean, None if printed.std_from_memory else printed.std, seeds)
    return Verdict(WITHIN if contains_zero(known) else OUTSIDE, "", known)


def cells(library: Library, table: PaperTable, row: PaperRow) -> list[PaperCell]:
    """The cells of a row in the paper's order."""
    found = []
    for heading, column in table.columns.items():
        printed = row.cells.get(heading)
        if column is None or row.method is None:
            why = "not measured here" if column is None else "no such method here"
            missing = Measured(why=why)
            found.append(PaperCell(heading, printed, missing, missing, Verdict(NOT_COMPARABLE, why)))
            continue
        own, best = under_own_protocol(library, table, row, column), tuned(library, table, row, column)
        found.append(PaperCell(heading, printed, own, best, verdict(printed, own, table.seeds)))
    return found
