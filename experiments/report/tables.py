"""The main table: ours, and beside it the baseline at local scale or the papers' numbers at paper scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.report.grid import Cell, Grid, Row
from experiments.report.loading import PublishedRow
from experiments.report.statistics import Summary

AVERAGE = "average"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Line:
    """One printed line: the row's label, whose numbers they are, one text a task and the average."""

    label: str
    origin: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class MainTable:
    """What the main table is made of; `baseline` is None at paper scale, `published` empty at local scale."""

    grid: Grid
    baseline: Grid | None
    published: Sequence[PublishedRow]


def points(value: float) -> str:
    """A signed difference with two digits, never -0.00."""
    return f"{round(value, 2) + 0.0:+.2f}"


def summary_text(summary: Summary) -> str:
    spread = f" ± {summary.std:.2f}" if summary.std is not None else ""
    return f"{summary.mean:.2f}{spread}" + (f" (n={summary.n})" if summary.n else "")


def status(cell: Cell) -> str:
    """One word for a cell: finished if any seed is."""
    if not cell.entries:
        return NOT_RUN
    if cell.repeated_seeds:
        return "ambiguous"
    if cell.finished:
        return "finished"
    return "diverged" if cell.count("diverged") == len(cell.entries) else "failed"


def cell_text(cell: Cell) -> str:
    """Mean ± std (n), or why there is none; what is wrong with some of the seeds follows in words."""
    if cell.summary is None:
        return status(cell)
    lost = [f"{cell.count(kind)} {kind}" for kind in ("failed", "diverged") if cell.count(kind)]
    return summary_text(cell.summary) + ("°" if cell.random_level else "") + (f", {', '.join(lost)}" if lost else "")


def baseline_cell(table: MainTable, row: Row, task: str) -> Cell | None:
    """The baseline's cell of the same method and task, and of the same learning rate where there are several."""
    if table.baseline is None:
        return None
    mine = row.cells[task]
    same_method = [other for other in table.baseline.rows if other.method == row.method and task in other.cells]
    found = [other.cells[task] for other in same_method if other.cells[task].summary]
    if len(found) > 1 or row.rate is not None:
        found = [cell for cell in found if cell.rates == mine.rates]
    if len(found) > 1 or row.settings is not None:
        found = [cell for cell in found if cell.settings == mine.settings]
    return found[0] if len(found) == 1 else None


def difference(table: MainTable, row: Row, task: str) -> float | None:
    """Our mean minus the baseline's, in points."""
    mine, other = row.cells[task].summary, baseline_cell(table, row, task)
    return mine.mean - other.summary.mean if mine and other and other.summary else None


def _difference_text(table: MainTable, row: Row, task: str) -> str:
    value, other = difference(table, row, task), baseline_cell(table, row, task)
    if other is None:
        return "baseline: none"
    if value is None:
        return "—"
    mine = row.cells[task]
    return points(value) + ("‡" if (mine.rates, mine.settings) != (other.rates, other.settings) else "")


def _baseline_line(table: MainTable, row: Row) -> Line:
    tasks = table.grid.tasks
    values = [difference(table, row, task) for task in tasks]
    known = [value for value in values if value is not None]
    average = points(sum(known) / len(known)) if known and len(known) == len(values) else "—"
    return Line(row.label, "minus baseline", (*(_difference_text(table, row, task) for task in tasks), average))


def published_text(row: PublishedRow, task: str) -> str:
    mean, std = row.cells.get(task, (None, None))
    if mean is None:
        return "—"
    return f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "") + ("†" if row.from_memory else "")


def lines(table: MainTable) -> list[Line]:
    """The printed lines of the main table."""
    tasks = table.grid.tasks
    result = []
    for position, row in enumerate(table.grid.rows):
        average = summary_text(row.average) if row.average else "—"
        result.append(Line(row.label, "ours", (*(cell_text(row.cells[task]) for task in tasks), average)))
        if table.baseline is not None and table.baseline.entries:
            result.append(_baseline_line(table, row))
        following = table.grid.rows[position + 1 :]
        if not any(other.method == row.method for other in following):
            for paper in (paper for paper in table.published if paper.method == row.method):
                texts = tuple(published_text(paper, task) for task in (*tasks, AVERAGE))
                origin = f"{paper.title} [{', '.join(paper.source)}]"
                result.append(Line(row.method, origin, texts))
    return result


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table, its first `words` columns left-aligned; a bar or line break in a cell cannot break it."""
    clean = [[" ".join(text.split()).replace("|", "\\|") for text in row] for row in (header, *rows)]
    rule = [":---"] * words + ["---:"] * (len(header) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in (clean[0], rule, *clean[1:])) + "\n"
