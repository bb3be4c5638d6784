"""The page of an experiment: main table, notes, sections, losses, test rows, and the file behind each cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from experiments.report.answers import readings
from experiments.report.columns import LOSS, LOSSES, unit
from experiments.report.figures import held_out_loss
from experiments.report.grid import Cell, Grid, Row, in_order, rate_text
from experiments.report.loading import Entry
from experiments.report.published import PublishedRow
from experiments.report.sections import Page, Section
from experiments.report.tables import NOT_RUN, MainTable, headings, lines
from experiments.report.traced import Traced, traced


def _intervals(grid: Grid) -> Section | None:
    def text(cell: Cell) -> Traced:
        summary, unit = cell.summary, cell.column.unit
        if summary is None or summary.low is None or summary.high is None:
            return Traced("—", ())
        return Traced(f"[{unit.text(summary.low)}, {unit.text(summary.high)}]", cell.finished)

    body = [[row.label, *map(text, row.cells.values())] for row in grid.rows]
    if not any(text.startswith("[") for _, *texts in body for text in texts):
        return None
    header = ["method", *map(grid.heading, grid.columns)]
    return Section("intervals", "95 % t intervals over seeds", header, body)


def _rates(row: Row) -> str:
    used = [cell for cell in row.tasks.values() if cell.entries]
    each = [(cell.task, ", ".join(map(rate_text, cell.rates))) for cell in used]
    if not each:
        return NOT_RUN
    if len({rates for _, rates in each}) == 1:
        return each[0][1]
    return "; ".join(f"{task} {rates}" for task, rates in each)


def _mean_loss(row: Row, task: str) -> str:
    """Mean over the finished seeds, if all of them have the loss."""
    for name in LOSSES:
        cell = row.cell(task, name)
        if cell.summary and len(cell.by_seed) == len(cell.finished):
            return Traced(LOSS.text(cell.summary.mean), cell.finished)
    return "—"


def _losses(grid: Grid) -> Section:
    splits = in_order((e.record.data.get("scored", {}).get("split", "test") for e in grid.entries), ())
    body = []
    for row in grid.rows:
        body.append([row.label, Traced(_rates(row), row.entries), *(_mean_loss(row, task) for task in grid.tasks)])
    title = f"Learning rate and held-out loss ({' and '.join(splits) or 'test'} split, mean over seeds)"
    return Section("losses", title, ["method", "learning rate", *grid.tasks], body, 2)


def _test_rows(grid: Grid) -> Section:
    body = []
    for task in grid.tasks:
        entries = [entry for entry in grid.entries if entry.finished and entry.record.task == task]
        records = [entry.record for entry in entries]

        def values(pick: Callable[[Mapping], object], records: Sequence = records) -> str:
            return ", ".join(in_order((str(pick(record.data)) for record in records), ())) or "—"

        def majority(data: Mapping) -> str:
            return f"{100 * data['majority_rate']:.2f}" if data.get("majority_rate") is not None else "—"

        texts = [
            values(lambda data: data.get("scored", {}).get("split", "—")),
            values(lambda data: data.get("scored", {}).get("n", "—")),
            values(lambda data: data.get("scored", {}).get("of", "—")),
            values(lambda data: data.get("train", {}).get("n", "—")),
            values(majority),
        ]
        body.append([task, *traced(texts, entries)])
    header = ["task", "split scored", "rows scored", "of", "training rows", "most frequent label %"]
    return Section("rows", "Rows", header, body, 2)


def _published(rows: Sequence[PublishedRow], sources: Mapping[str, str]) -> Section:
    body = [[row.method, row.title, ", ".join(row.source), f"{row.confidence:g}", row.note] for row in rows]
    keys = in_order((key for row in rows for key in row.source), tuple(sources))
    header = ["method", "table", "sources", "confidence", "note"]
    meaning = [f"{key}: {sources[key]}" for key in keys]
    return Section("published", "Where the published numbers come from", header, body, 5, "", meaning)


def convergence(grid: Grid, pictures: Sequence[str]) -> Section | None:
    """The loss curves; None where no record holds one."""
    if not pictures:
        return None
    measured = [entry.record for entry in grid.entries if held_out_loss(entry.record)]
    sizes = in_order((str(record.config.get("train", {}).get("held_out_rows", "?")) for record in measured), ())
    about = "No record holds the held-out loss along the way, so there is no speed-up to a target."
    if sizes:
        about = f"Held-out loss in the picture: of the first {', '.join(sizes)} held-out rows."
    return Section("convergence", "Convergence", (), (), 0, about, (), tuple(pictures))


def _score(entry: Entry) -> str:
    """The first of a run's metrics that it has."""
    for name in entry.metrics:
        value = entry.shown(name)
        if value is not None:
            return f"{name} {unit(name).text(value)}"
    return "—"


def records(grid: Grid, key: str = "records", title: str = "Records") -> Section:
    """The file behind every cell."""
    body = []
    for row in grid.rows:
        for entry in row.entries:
            record = entry.record
            score = _score(entry) if entry.finished else (record.error or "—")[:120]
            about = [record.task, row.label, rate_text(record.learning_rate), str(record.seed)]
            body.append([*about, record.status, score, Traced(entry.file, [entry])])
    header = ["task", "method", "learning rate", "seed", "status", "metric", "file"]
    return Section(key, title, header, body, 7, "" if body else "None.")


def _units(grid: Grid) -> str:
    """What the columns' numbers are."""
    if grid.averaged:
        metrics = in_order((f"{column.task} {column.metric}".strip() for column in grid.columns if column.metric), ())
        return f"in percent ({', '.join(metrics) or 'accuracy'})"
    each = dict.fromkeys(f"{column.metric} in {column.unit.words}" for column in grid.columns if column.metric)
    return f"columns in order: {', '.join(each)}"


def legend(table: MainTable) -> list[str]:
    """How to read the main table."""
    notes = [f"Mean ± sample std over n seeds, {_units(table.grid)}."]
    if table.baseline is not None:
        known, points = bool(table.baseline.entries), "points" if table.grid.averaged else "the column's unit"
        notes.append(f"Baseline: the committed records; differences in {points}." if known else "Baseline: none.")
    text = " ".join(text for line in lines(table) for text in line.texts)
    if "‡" in text:
        notes.append("‡ The baseline has another learning rate or other settings here.")
    if table.published:
        notes.append("Published rows: mean ± std as printed; where we have them from is in results/published.yaml.")
    if "†" in text:
        notes.append("† From memory only: check the paper before citing.")
    return notes


def page(
    name: str,
    title: str,
    table: MainTable,
    notes: Sequence[str],
    sources: Mapping[str, str],
    sections: Sequence[Section],
) -> Page:
    """The whole page."""
    grid = table.grid
    main = [[line.label, line.origin, *line.texts] for line in lines(table)]
    header = ["method", "result", *headings(table)]
    parts = [
        _intervals(grid),
        readings(grid),
        _losses(grid),
        *sections,
        _test_rows(grid),
        _published(table.published, sources) if table.published else None,
        records(grid),
    ]
    opening = Section("main", title, header, main, 2, "", [*legend(table), *notes])
    return Page(name, opening, [part for part in parts if part is not None])
