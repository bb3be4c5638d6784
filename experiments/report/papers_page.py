"""The papers' tables as a page, LaTeX and CSV: three numbers a cell, difference and verdict."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.report.comparison import interval_text
from experiments.report.exports import NEEDS_XCOLOR, csv_lines, latex_line, latex_table
from experiments.report.flags import flags
from experiments.report.grid import Grid, build_grid, in_order
from experiments.report.loading import NO_PLAN
from experiments.report.papers import (
    NOT_RUN,
    OUTSIDE,
    TUNED,
    WITHIN,
    Library,
    Measured,
    PaperCell,
    Verdict,
    cells,
    tuning_runs,
    under_own_protocol,
)
from experiments.report.papers import tuned as tuned_runs
from experiments.report.published import PaperRow, PaperTable, Printed, differing
from experiments.report.sections import Page, Section
from experiments.report.statistics import holm
from experiments.report.tables import printed_text, summary_text
from experiments.report.traced import Traced
from experiments.report.tuning import footnotes, searches

LEGEND = (
    "Published: mean ± std as printed; grey with † where memory alone vouches for it, and then no verdict rests on it.",
    "Own protocol: our runs under the paper's protocol. Tuned: our runs under the protocol `common`, each method at "
    "the rate that the same search on validation rows chose for it (experiments ending in _tuned).",
    "Verdict: whether the 95 % interval of own minus published holds 0 (Welch's where the printed std and its n are "
    "known, else the printed mean is taken as exact). Within does not mean equal: look at the interval's width.",
)
CSV_HEADER = (
    "table",
    "row",
    "column",
    "published_mean",
    "published_std",
    "source",
    "from_memory",
    "confidence",
    "own_mean",
    "own_std",
    "own_n",
    "tuned_mean",
    "tuned_std",
    "tuned_n",
    "difference",
    "low",
    "high",
    "p",
    "verdict",
    "why",
    "records",
)


def _published(printed: Printed | None) -> str:
    return printed_text(printed) if printed else "—"


def _ours(measured: Measured) -> Traced:
    text = summary_text(measured.summary, measured.unit) if measured.summary else measured.why
    return Traced(text, measured.entries)


def _verdict(verdict: Verdict, measured: Measured) -> str:
    gap = verdict.difference
    if gap is not None:
        interval = interval_text(measured.unit, (gap.low, gap.high))
        return f"{measured.unit.signed(gap.value)} {interval}: {verdict.kind}"
    return f"{verdict.kind} ({verdict.why})" if verdict.why else verdict.kind


def _lines(row: PaperRow, found: Sequence[PaperCell]) -> list[list[str]]:
    return [
        [row.name, "published", *(_published(cell.printed) for cell in found)],
        [row.name, "own protocol", *(_ours(cell.own) for cell in found)],
        [row.name, "tuned", *(_ours(cell.tuned) for cell in found)],
        [row.name, "verdict", *(Traced(_verdict(cell.verdict, cell.own), cell.own.entries) for cell in found)],
    ]


def _notes(library: Library, table: PaperTable, found: Sequence[Sequence[PaperCell]]) -> list[str]:
    """What was measured, where the numbers are from, how many verdicts survive, and the flags of our runs."""
    notes = [f"{table.paper}; {table.metric}."]
    notes += [f"Note: {table.note}."] if table.note else []
    sources = in_order((key for row in table.rows for key in row.source), tuple(library.sources))
    notes.append(f"Sources: {'; '.join(f'{key}: {library.sources[key]}' for key in sources)}.")
    judged = [cell.verdict for row in found for cell in row if cell.verdict.difference is not None]
    outside = sum(verdict.kind == OUTSIDE for verdict in judged)
    ps = [verdict.difference.p for verdict in judged if verdict.difference and verdict.difference.p is not None]
    if judged:
        kept = sum(p < 0.05 for p in holm(ps))
        notes.append(
            f"{len(judged) - outside} of {len(judged)} verdicts {WITHIN}; of {outside} outside, {kept} remain after "
            f"Holm's correction for {len(ps)} tests."
        )
    used = {entry.file: entry for row in found for cell in row for entry in cell.own.entries}
    for name in table.experiments:
        runs = tuning_runs(library, table, name)
        notes += footnotes(searches(runs), name + TUNED, runs, NO_PLAN, Grid((), ()))
    if used:
        notes += [f"Own protocol: {flag}" for flag in flags(build_grid(list(used.values()), NO_PLAN, "paper"), [])]
    return notes


def _rows(library: Library, table: PaperTable) -> list[tuple[PaperRow, list[PaperCell]]]:
    return [(row, cells(library, table, row)) for row in table.rows]


def _differing(library: Library) -> list[list[str]]:
    """Paper says, other paper says, we measured."""
    body = []
    for (method, rank, column), found in differing(library.tables).items():
        texts = [f"{_published(cell)} ({table.title})" for table, _, cell in found]
        ours, runs = [], []
        for table, row, _ in found:
            if table.protocol is not None:
                own = under_own_protocol(library, table, row, column)
                ours += [f"{_ours(own)} under {table.protocol}"] if own.entries else []
                best = tuned_runs(library, table, row, column)
                runs += [*own.entries, *best.entries]
                ours += [f"{_ours(best)} tuned"] if best.entries else []
        label = method if rank == 8 else f"{method} (rank {rank})"
        name = f"{column.task} {column.metric}".strip()
        measured = Traced("; ".join(dict.fromkeys(ours)) or NOT_RUN, runs)
        body.append([label, name, texts[0], "; ".join(texts[1:]), measured])
    return body


def page(library: Library) -> Page:
    """Every table, then where papers print unlike numbers for one cell."""
    sections = []
    for table in library.shown:
        rows = _rows(library, table)
        body = [line for row, found in rows for line in _lines(row, found)]
        notes = _notes(library, table, [found for _, found in rows])
        sections.append(Section(table.key, table.title, ["method", "number", *table.columns], body, 2, "", notes))
    header = ["method", "column", "a paper says", "other papers say", "we measured"]
    title = "Where papers print unlike numbers for one cell"
    left_out = [f"Left out, not readable as records of these tables: {', '.join(library.skipped)}."]
    notes = left_out if library.skipped else []
    sections.append(Section("differing", title, header, _differing(library), 5, "", notes))
    return Page("papers", Section("about", "The papers' tables", (), (), notes=LEGEND), sections)


def latex(library: Library) -> str:
    """A LaTeX table for each of the papers', for \\usepackage{xcolor} beside what every table needs."""
    parts = [NEEDS_XCOLOR]
    for table in library.shown:
        body: list[str] = []
        rows = _rows(library, table)
        for row, found in rows:
            body += [r"\addlinespace"] if body else []
            for place, line in enumerate(_lines(row, found)):
                name = line[0] if place == 0 else ""
                body.append(latex_line([name, *line[1:]]))
        notes = [*LEGEND, *_notes(library, table, [found for _, found in rows])]
        header = ["method", "number", *table.columns]
        parts.append(latex_table(header, body, table.title, table.key.replace("_", "-"), notes))
    return "\n".join(parts)


def _numbers(measured: Measured) -> list[str]:
    known = measured.summary
    if known is None:
        return ["", "", "0"]
    return [f"{known.mean:.4f}", "" if known.std is None else f"{known.std:.4f}", str(known.n)]


def csv_text(library: Library) -> str:
    """One line a cell, with the files of our runs behind it."""
    lines = []
    for table in library.shown:
        for row, found in _rows(library, table):
            for cell in found:
                printed, gap = cell.printed, cell.verdict.difference
                known = (printed.mean, printed.std) if printed else (None, None)
                trust = (
                    [" ".join(printed.source), str(printed.from_memory).lower(), f"{printed.confidence:g}"]
                    if printed
                    else [""] * 3
                )
                tested = (gap.value, gap.low, gap.high, gap.p) if gap else (None,) * 4
                files = " ".join(entry.file for entry in (*cell.own.entries, *cell.tuned.entries))
                lines.append(
                    [
                        table.key,
                        row.name,
                        cell.heading,
                        *("" if value is None else f"{value:.2f}" for value in known),
                        *trust,
                        *_numbers(cell.own),
                        *_numbers(cell.tuned),
                        *("" if value is None else f"{value:.4f}" for value in tested),
                        cell.verdict.kind,
                        cell.verdict.why,
                        files,
                    ]
                )
    return csv_lines([CSV_HEADER, *lines])
