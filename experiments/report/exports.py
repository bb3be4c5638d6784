"""The main table as LaTeX (booktabs) and, one line a cell with everything behind it, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from experiments.report.columns import PERCENT
from experiments.report.grid import Row
from experiments.report.published import AVERAGE, PublishedRow
from experiments.report.statistics import Summary
from experiments.report.tables import GREY, GREY_END, MainTable, difference, headings, lines, status

LATEX = {
    "\\": r"\textbackslash{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "°": r"$^\circ$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "§": r"\S{}",
    "—": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    GREY: r"\textcolor{gray}{",
    GREY_END: "}",
}
NEEDS_XCOLOR = "% grey cells need \\usepackage{xcolor}\n"
CSV_HEADER = (
    "row",
    "method",
    "task",
    "origin",
    "status",
    "metric",
    "mean_percent",  # and std_percent: without _percent where the table has other units
    "std_percent",
    "n",
    "ci95_low",
    "ci95_high",
    "failed",
    "diverged",
    "random_level",
    "difference_to_baseline",
    "source",
    "from_memory",
    "confidence",
)


def escape(text: str) -> str:
    """Text for LaTeX."""
    return "".join(LATEX.get(character, character) for character in text)


def latex_table(
    header: Sequence[str], body: Sequence[str], caption: str, label: str, notes: Sequence[str], words: int = 2
) -> str:
    """A LaTeX table of finished lines, its first `words` columns left-aligned; needs booktabs and graphicx."""
    content = [
        "% needs \\usepackage{booktabs} and \\usepackage{graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        rf"\label{{tab:{label}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{'l' * words}{'r' * (len(header) - words)}}}",
        r"\toprule",
        latex_line(header),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\par\footnotesize {escape(note)}" for note in notes),
        r"\end{table}",
    ]
    return "\n".join(content) + "\n"


def latex_line(texts: Sequence[str]) -> str:
    return " & ".join(map(escape, texts)) + r" \\"


def latex(table: MainTable, caption: str, label: str, notes: Sequence[str]) -> str:
    """The main table in LaTeX."""
    body: list[str] = []
    printed = lines(table)
    needs = NEEDS_XCOLOR if any(GREY in text for line in printed for text in line.texts) else ""
    grouped = len(printed) > len(table.grid.rows)
    previous = None
    for line in printed:
        body += [r"\addlinespace"] if grouped and previous not in (None, line.label) else []
        body.append(latex_line(("" if line.label == previous else line.label, line.origin, *line.texts)))
        previous = line.label
    return needs + latex_table(["method", "result", *headings(table)], body, caption, label, notes)


def csv_lines(rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _numbers(summary: Summary | None) -> list[str]:
    if summary is None:
        return ["", "", "0", "", ""]
    texts = ["" if x is None else f"{x:.4f}" for x in (summary.mean, summary.std, summary.low, summary.high)]
    return [*texts[:2], str(summary.n) if summary.n else "", *texts[2:]]


def _csv_ours(table: MainTable, row: Row) -> list[list[str]]:
    result = []
    for column, cell in row.cells.items():
        delta = difference(table, row, column)
        counts = [str(cell.count("failed")), str(cell.count("diverged")), str(cell.random_level)]
        tail = ["" if delta is None else f"{delta:.4f}", "", "", "", column.unit.words]
        start = [row.label, row.method, column.task, "ours", status(cell), column.metric]
        result.append([*start, *_numbers(cell.summary), *counts, *tail])
    if table.grid.averaged:
        start = [row.label, row.method, AVERAGE.task, "ours", "finished" if row.average else "incomplete", ""]
        result.append([*start, *_numbers(row.average), *[""] * 7, PERCENT.words])
    return result


def _csv_published(table: MainTable, row: PublishedRow) -> list[list[str]]:
    result = []
    for column in (*table.grid.columns, *([AVERAGE] if table.grid.averaged else [])):
        cell = row.cells.get(column)
        mean, std = (cell.mean, cell.std) if cell else (None, None)
        numbers = ["" if x is None else f"{x:.2f}" for x in (mean, std)]
        tail = [
            " ".join(row.source),
            str(cell.from_memory if cell else row.from_memory).lower(),
            f"{row.confidence:g}",
            column.unit.words,
        ]
        start = [row.method, row.method, column.task, row.title, "published" if mean is not None else "not known"]
        result.append([*start, column.metric, *numbers, *[""] * 7, *tail])
    return result


def csv_text(table: MainTable) -> str:
    """One line a cell: ours, then what the papers print; a column `unit` where not everything is in percent."""
    rows = [line for row in table.grid.rows for line in _csv_ours(table, row)]
    rows += [line for paper in table.published for line in _csv_published(table, paper)]
    header = [*CSV_HEADER, "unit"]
    if all(column.unit is PERCENT for column in table.grid.columns):
        header, rows = header[:-1], [line[:-1] for line in rows]
    else:
        header = [name.removesuffix("_percent") for name in header]
    return csv_lines([header, *rows])
