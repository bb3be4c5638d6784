"""The main table: ours, and beside it the baseline at local scale or the papers' numbers at paper scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.report.columns import PERCENT, Column, Unit
from experiments.report.grid import Cell, Grid, Row
from experiments.report.published import AVERAGE, Printed, PublishedRow
from experiments.report.statistics import Summary
from experiments.report.traced import Traced

NOT_RUN = "not run"
# Around what memory alone vouches for, in any text; private-use characters, for which each form puts its own grey.
GREY, GREY_END = "\ue000", "\ue001"


@dataclass(frozen=True)
class Line:
    """One printed line: the row's label, whose numbers they are, one text a column, and the average if any."""

    label: str
    origin: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class MainTable:
    """What the main table is made of; `baseline` is None at paper scale, `published` empty at local scale."""

    grid: Grid
    baseline: Grid | None
    published: Sequence[PublishedRow]


def summary_text(summary: Summary, unit: Unit = PERCENT) -> str:
    spread = f" ± {unit.text(summary.std)}" if summary.std is not None else ""
    return f"{unit.text(summary.mean)}{spread}" + (f" (n={summary.n})" if summary.n else "")


def status(cell: Cell) -> str:
    """One word for a cell: finished if any seed has the metric, not run if the runs finished without it."""
    if cell.repeated_seeds:
        return "ambiguous"
    if cell.by_seed:
        return "finished"
    if cell.finished or not cell.entries:
        return NOT_RUN
    return "diverged" if cell.count("diverged") == len(cell.entries) else "failed"


def cell_text(cell: Cell) -> str:
    """Mean ± std (n), or why there is none; what is wrong with some of the seeds follows in words."""
    if cell.summary is None:
        return status(cell)
    marks = ("°" if cell.random_level else "") + ("§" if cell.untrusted else "")
    lost = [f"{cell.count(kind)} {kind}" for kind in ("failed", "diverged") if cell.count(kind)]
    return summary_text(cell.summary, cell.column.unit) + marks + (f", {', '.join(lost)}" if lost else "")


def baseline_cell(table: MainTable, row: Row, column: Column) -> Cell | None:
    """The baseline's cell of the same method and column, and of the same learning rate where there are several."""
    if table.baseline is None:
        return None
    mine = row.cells[column]
    same_method = [other for other in table.baseline.rows if other.method == row.method and column in other.cells]
    found = [other.cells[column] for other in same_method if other.cells[column].summary]
    if len(found) > 1 or row.rate is not None:
        found = [cell for cell in found if cell.rates == mine.rates]
    if len(found) > 1 or row.settings is not None:
        found = [cell for cell in found if cell.settings == mine.settings]
    return found[0] if len(found) == 1 else None


def difference(table: MainTable, row: Row, column: Column) -> float | None:
    """Our mean minus the baseline's, in the column's unit."""
    mine, other = row.cells[column].summary, baseline_cell(table, row, column)
    return mine.mean - other.summary.mean if mine and other and other.summary else None


def _difference_text(table: MainTable, row: Row, column: Column) -> str:
    value, other = difference(table, row, column), baseline_cell(table, row, column)
    if other is None:
        return "baseline: none"
    if value is None:
        return "—"
    mine = row.cells[column]
    unlike = (mine.rates, mine.settings) != (other.rates, other.settings)
    return column.unit.signed(value) + ("‡" if unlike else "")


def _baseline_line(table: MainTable, row: Row) -> Line:
    columns = table.grid.columns
    behind = {
        column: [*row.cells[column].entries, *(other.entries if (other := baseline_cell(table, row, column)) else ())]
        for column in columns
    }
    texts = [Traced(_difference_text(table, row, column), behind[column]) for column in columns]
    if table.grid.averaged:
        values = [difference(table, row, column) for column in columns]
        known = [value for value in values if value is not None]
        mean = PERCENT.signed(sum(known) / len(known)) if known and len(known) == len(values) else "—"
        texts.append(Traced(mean, [entry for entries in behind.values() for entry in entries]))
    return Line(row.label, "minus baseline", tuple(texts))


def published_text(table: MainTable, paper: PublishedRow, column: Column) -> str:
    """A paper's number, except beside grades of a judge that is not trusted."""
    cell = paper.cells.get(column)
    if cell is None or any(column in row.cells and row.cells[column].untrusted for row in table.grid.rows):
        return "—"
    return printed_text(cell)


def printed_text(cell: Printed) -> str:
    """A paper's number; grey with † where memory alone vouches for it (or for its std)."""
    if cell.mean is None:
        return "—"
    spread = f"± {cell.std:.2f}" if cell.std is not None else ""
    if cell.from_memory:
        return f"{GREY}{f'{cell.mean:.2f} {spread}'.rstrip()}{GREY_END}†"
    if spread and cell.std_from_memory:
        return f"{cell.mean:.2f} {GREY}{spread}{GREY_END}†"
    return f"{cell.mean:.2f} {spread}".rstrip()


def headings(table: MainTable) -> list[str]:
    """What stands above the texts of a line."""
    grid = table.grid
    return [*map(grid.heading, grid.columns), *([AVERAGE.task] if grid.averaged else [])]


def lines(table: MainTable) -> list[Line]:
    """The printed lines of the main table."""
    grid, result = table.grid, []
    shown = (*grid.columns, *([AVERAGE] if grid.averaged else []))
    for position, row in enumerate(grid.rows):
        texts = [Traced(cell_text(cell), cell.entries) for cell in row.cells.values()]
        if grid.averaged:
            texts.append(Traced(summary_text(row.average) if row.average else "—", row.entries))
        result.append(Line(row.label, "ours", tuple(texts)))
        if table.baseline is not None and table.baseline.entries:
            result.append(_baseline_line(table, row))
        if not any(other.method == row.method for other in grid.rows[position + 1 :]):
            for paper in (paper for paper in table.published if paper.method == row.method):
                printed = (published_text(table, paper, column) for column in shown)
                result.append(Line(row.method, f"{paper.title} [{', '.join(paper.source)}]", tuple(printed)))
    return result


def _markdown_text(text: str) -> str:
    """One line without bars; grey as GitHub shows it, in a formula."""
    shown, *grey = " ".join(text.split()).replace("|", r"\|").split(GREY)
    for part in grey:
        number, _, after = part.partition(GREY_END)
        shown += r"$\color{gray}{" + number.replace("±", r"\pm") + "}$" + after
    return shown


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table, its first `words` columns left-aligned; a bar or line break in a cell cannot break it."""
    clean = [[_markdown_text(text) for text in row] for row in (header, *rows)]
    rule = [":---"] * words + ["---:"] * (len(header) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in (clean[0], rule, *clean[1:])) + "\n"
