"""How many points the protocol is worth and how many the method: one checkpoint scored under several protocols.

A two-way table y = mean + method + protocol + rest over the methods that were scored under every protocol, each
method on the seeds it has under all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.report.columns import Column, Unit
from experiments.report.exports import csv_lines, latex_line, latex_table
from experiments.report.flags import flags
from experiments.report.grid import Cell, Grid, build_grid, in_order
from experiments.report.loading import Entry, Plan
from experiments.report.page import records
from experiments.report.sections import Page, Section
from experiments.report.tables import cell_text, status
from experiments.report.traced import Traced

PROTOCOLS = ("common", "lora_ga", "lora_one", "lora_pro")
CSV_HEADER = ("task", "metric", "method", "protocol", "status", "mean", "std", "n", "in_block", "unit")


@dataclass(frozen=True)
class Effects:
    """Of a (methods, protocols) table of means: how far protocols move a method, and methods a protocol."""

    protocol_range: float
    protocol_std: float
    method_range: float
    method_std: float
    residual_std: float


def effects(table: np.ndarray) -> Effects:
    """Two-way decomposition of (methods, protocols) means, at least 2 x 2 and without gaps (ValueError).

    The ranges are max - min along one way, averaged over the other; the stds are sample stds of the main effects; the
    residual is what no sum of a method's and a protocol's effect gives, over its (methods - 1)(protocols - 1) degrees
    of freedom.
    """
    if table.ndim != 2 or min(table.shape) < 2 or not np.isfinite(table).all():
        raise ValueError(f"a two-way table needs 2 x 2 numbers or more, without gaps, not {table.shape}")
    method, protocol = table.mean(1) - table.mean(), table.mean(0) - table.mean()
    residual = table - table.mean() - method[:, None] - protocol[None, :]
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    return Effects(
        protocol_range=float(np.ptp(table, axis=1).mean()),
        protocol_std=float(protocol.std(ddof=1)),
        method_range=float(np.ptp(table, axis=0).mean()),
        method_std=float(method.std(ddof=1)),
        residual_std=float(np.sqrt((residual**2).sum() / freedom)),
    )


@dataclass(frozen=True)
class Scores:
    """One metric of one task: for each method, by its label, a cell under each of the protocols."""

    column: Column
    protocols: tuple[str, ...]
    cells: Mapping[str, Mapping[str, Cell]]

    def block(self) -> dict[str, dict[str, float]]:
        """Means of the methods scored under every protocol, over the seeds that all of these have."""
        found = {}
        for label, cells in self.cells.items():
            if any(cell.repeated_seeds for cell in cells.values()):
                continue
            seeds = set.intersection(*(set(cell.by_seed) for cell in cells.values()))
            if seeds:
                found[label] = {
                    name: sum(cell.by_seed[seed] for seed in sorted(seeds)) / len(seeds) for name, cell in cells.items()
                }
        return found


def rescored(entries: Sequence[Entry]) -> bool:
    """Whether models trained under one protocol were scored under several."""
    pairs = {((entry.record.config.get("protocol") or {}).get("name"), entry.record.protocol) for entry in entries}
    return len(pairs) > len({trained for trained, _ in pairs})


def _columns(grids: Mapping[str, Grid]) -> list[Column]:
    """The headline metric of each task, and the same metric of its other benchmarks: seen/strict, new/strict."""
    found: dict[Column, None] = {}
    for grid in grids.values():
        for task in grid.tasks:
            shown = [column.metric for column in grid.columns if column.task == task]
            held = [name for entry in grid.entries if entry.record.task == task for name in entry.record.metrics]
            reading = shown[0].partition("/")[2]
            same = [name for name in (*shown, *held) if reading and name.endswith(f"/{reading}")]
            found |= {Column(task, name): None for name in (shown[0], *same)}
    return list(found)


def by_protocol(entries: Sequence[Entry], plan: Plan, scale: str) -> dict[str, Grid]:
    """The records of each protocol recorded or planned, arranged as a table of their own."""
    names = in_order([*plan.protocols, *(entry.record.protocol for entry in entries)], PROTOCOLS)
    return {
        name: build_grid([entry for entry in entries if entry.record.protocol == name], plan, scale) for name in names
    }


def scores(grids: Mapping[str, Grid]) -> list[Scores]:
    """A table for each task and benchmark, methods in the order of the main table."""
    result = []
    for column in _columns(grids):
        cells: dict[str, dict[str, Cell]] = {}
        for name, grid in grids.items():
            for row in grid.rows:
                cells.setdefault(row.label, {})[name] = row.cell(column.task, column.metric)
        missing = Cell(column, ())
        whole = {label: {name: known.get(name, missing) for name in grids} for label, known in cells.items()}
        result.append(Scores(column, tuple(grids), whole))
    return result


def summary_lines(table: Scores) -> list[str]:
    """What the protocols move and what the methods move, in the metric's unit; a line saying why, where nothing can."""
    block, unit = table.block(), table.column.unit
    if min(len(block), len(table.protocols)) < 2:
        return [
            f"No comparison of protocol and method: {len(block)} methods scored under {len(table.protocols)} protocols."
        ]
    known = effects(np.array([[means[name] for name in table.protocols] for means in block.values()]))

    def line(what: str, span: float, over: str, std: float) -> str:
        return f"Owed to {what}: {unit.text(span)} {_points(unit)} (max - min, mean over {over}); std {unit.text(std)}."

    return [
        line("the protocol", known.protocol_range, "methods", known.protocol_std),
        line("the method", known.method_range, "protocols", known.method_std),
        f"Left over, owed to neither alone: std {unit.text(known.residual_std)}.",
        f"Over the {len(block)} methods scored under all {len(table.protocols)} protocols: {', '.join(block)}. A range "
        "grows with the number of its levels and holds the noise of seeds and sampling too.",
    ]


def _points(unit: Unit) -> str:
    return "points" if unit.factor == 100 else unit.words


def _title(column: Column) -> str:
    return f"{column.task}: {column.words}"


def _body(table: Scores) -> list[list[str]]:
    return [
        [label, *(Traced(cell_text(cell), cell.entries) for cell in cells.values())]
        for label, cells in table.cells.items()
    ]


def notes(grids: Mapping[str, Grid], skipped: Sequence[str]) -> list[str]:
    """Flags of the records, said once where they hold under every protocol."""
    each = {name: flags(grid, skipped) for name, grid in grids.items()}
    shared = [flag for flag in next(iter(each.values())) if all(flag in other for other in each.values())]
    return shared + [f"{name}: {flag}" for name, found in each.items() for flag in found if flag not in shared]


def page(name: str, title: str, grids: Mapping[str, Grid], planned: Sequence[str], skipped: Sequence[str]) -> Page:
    """A table and its summary for each metric, notes, and the file behind each cell."""
    about = "Mean ± sample std over n seeds; the same trained model in every column of a line."
    sections = []
    for number, table in enumerate(scores(grids), start=1):
        heading, header = f"{_title(table.column)}, in {table.column.unit.words}", ["method", *table.protocols]
        sections.append(Section(f"scores-{number}", heading, header, _body(table), 1, "", summary_lines(table)))
    sections.append(Section("notes", "Notes", (), (), notes=[*planned, *notes(grids, skipped)]))
    sections += [records(grid, f"records-{under}", f"Records scored under {under}") for under, grid in grids.items()]
    return Page(name, Section("about", title, (), (), legend=about), sections)


def csv_text(grids: Mapping[str, Grid]) -> str:
    """One line a method and protocol."""
    rows = []
    for table in scores(grids):
        block, column = table.block(), table.column
        for label, cells in table.cells.items():
            for name, cell in cells.items():
                known = cell.summary
                numbers = ["" if known is None or x is None else f"{x:.4f}" for x in _mean_std(cell)]
                about = [column.task, column.metric, label, name, status(cell)]
                count = str(known.n if known else 0)
                rows.append([*about, *numbers, count, str(label in block).lower(), column.unit.words])
    return csv_lines([CSV_HEADER, *rows])


def _mean_std(cell: Cell) -> tuple[float | None, float | None]:
    return (cell.summary.mean, cell.summary.std) if cell.summary else (None, None)


def latex(grids: Mapping[str, Grid], caption: str, label: str) -> str:
    """A LaTeX table for each metric, its summary below it."""
    parts = []
    for number, table in enumerate(scores(grids), start=1):
        body = [latex_line(line) for line in _body(table)]
        title = f"{caption}, {_title(table.column)}, in {table.column.unit.words}"
        header = ["method", *table.protocols]
        parts.append(latex_table(header, body, title, f"{label}-{number}", summary_lines(table), words=1))
    return "\n".join(parts)
