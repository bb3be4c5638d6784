"""Every method against LoRA on the seeds both have, and the methods over all tasks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.report.columns import PERCENT, Unit
from experiments.report.grid import Cell, Grid, Row
from experiments.report.loading import Entry
from experiments.report.sections import Section
from experiments.report.statistics import (
    Difference,
    Interval,
    bootstrap,
    holm,
    interquartile_mean,
    mean_of_means,
    paired,
    probability_of_improvement,
)
from experiments.report.traced import traced

BASE = "lora"
LEGEND = (
    "Method minus LoRA on the seeds both have: paired t interval, and the bootstrap of the same gaps (stratified by "
    "task where there are several; too narrow with few seeds: trust the t interval). P(better): chance that a run of "
    "the method beats one of LoRA, ties counting half. Holm: p adjusted for all {tests} tests of this table."
)


@dataclass(frozen=True)
class Contrast:
    """A method against LoRA in one column, or in the average of all."""

    method: str
    column: str
    unit: Unit
    seeds: int
    difference: Difference
    bootstrap: Interval | None
    better: float
    entries: tuple[Entry, ...]


def base_row(grid: Grid) -> Row | None:
    """LoRA's row, if there is exactly one."""
    found = [row for row in grid.rows if row.method == BASE and row.entries]
    return found[0] if len(found) == 1 else None


def _shared(pairs: Sequence[tuple[Cell, Cell]]) -> list[int]:
    """Seeds that every cell has; none where a cell holds a seed twice."""
    cells = [cell for pair in pairs for cell in pair]
    if not cells or any(cell.repeated_seeds for cell in cells):
        return []
    return sorted(set.intersection(*(set(cell.by_seed) for cell in cells)))


def _contrast(method: str, column: str, pairs: Sequence[tuple[Cell, Cell]]) -> Contrast | None:
    """Of (method's cell, LoRA's cell) for each task; None without a shared seed."""
    seeds = _shared(pairs)
    if not seeds:
        return None
    mine = np.array([[cell.by_seed[seed] for seed in seeds] for cell, _ in pairs])
    base = np.array([[cell.by_seed[seed] for seed in seeds] for _, cell in pairs])
    unit = pairs[0][0].column.unit
    sign = -1 if unit.lower_is_better else 1
    runs = (entry for pair in pairs for cell in pair for entry in cell.finished if entry.record.seed in seeds)
    return Contrast(
        method,
        column,
        unit,
        len(seeds),
        paired(list(mine.mean(0)), list(base.mean(0))),
        bootstrap([list(gaps) for gaps in mine - base], mean_of_means),
        probability_of_improvement([list(sign * x) for x in mine], [list(sign * x) for x in base]),
        tuple(runs),
    )


def contrasts(grid: Grid) -> list[Contrast]:
    """All that can be compared, methods in the table's order, the average last."""
    base, found = base_row(grid), []
    for row in grid.rows if base is not None else ():
        if base is None or row is base:
            continue
        for column in grid.columns:
            found.append(_contrast(row.label, grid.heading(column), [(row.cells[column], base.cells[column])]))
        if grid.averaged and len(grid.columns) > 1:
            pairs = [(row.cells[column], base.cells[column]) for column in grid.columns]
            found.append(_contrast(row.label, "average", pairs))
    return [contrast for contrast in found if contrast is not None]


def interval_text(unit: Unit, interval: tuple[float | None, float | None] | None) -> str:
    if interval is None or interval[0] is None or interval[1] is None:
        return "—"
    return f"[{unit.signed(interval[0])}, {unit.signed(interval[1])}]"


def against_lora(grid: Grid) -> Section | None:
    """The comparisons as a table; None without LoRA or anything beside it."""
    found = contrasts(grid)
    if not found:
        return None
    tested = [contrast.difference.p for contrast in found if contrast.difference.p is not None]
    adjusted = iter(holm(tested))
    body = []
    for known in found:
        gap = known.difference
        ps = ["—", "—"] if gap.p is None else [f"{gap.p:.3f}", f"{next(adjusted):.3f}"]
        name = f"{known.column} (lower is better)" if known.unit.lower_is_better else known.column
        intervals = [interval_text(known.unit, (gap.low, gap.high)), interval_text(known.unit, known.bootstrap)]
        texts = [str(known.seeds), known.unit.signed(gap.value), *intervals, f"{known.better:.2f}", *ps]
        body.append([known.method, name, *traced(texts, known.entries)])
    header = ["method", "column", "seeds", "difference", "95 % t", "95 % bootstrap", "P(better)", "p", "p (Holm)"]
    return Section("against-lora", "Against LoRA", header, body, 2, LEGEND.format(tests=len(tested)))


def over_tasks(grid: Grid) -> Section | None:
    """Mean and interquartile mean over all tasks with stratified bootstrap intervals; None for fewer than two tasks."""
    if not grid.averaged or len(grid.columns) < 2:
        return None
    body = []
    for row in grid.rows:
        cells = list(row.cells.values())
        if not all(cell.by_seed and not cell.repeated_seeds for cell in cells):
            continue
        groups = [np.array(list(cell.by_seed.values())) for cell in cells]
        texts = [str(sum(map(len, groups)))]
        for statistic in (mean_of_means, interquartile_mean):
            interval = bootstrap([list(group) for group in groups], statistic)
            held = f"[{PERCENT.text(interval[0])}, {PERCENT.text(interval[1])}]" if interval else "—"
            texts += [PERCENT.text(float(statistic(*groups))), held]
        body.append([row.label, *traced(texts, [entry for cell in cells for entry in cell.finished])])
    header = ["method", "runs", "mean", "95 % bootstrap", "interquartile mean", "95 % bootstrap of it"]
    legend = "In percent. The interquartile mean is over the middle half of all runs on all tasks."
    return Section("over-tasks", "Over all tasks", header, body, 1, legend) if body else None
