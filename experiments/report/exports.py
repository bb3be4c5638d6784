"""The main table as LaTeX (booktabs) and, one line a cell with everything behind it, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from experiments.report.grid import Row
from experiments.report.loading import PublishedRow
from experiments.report.statistics import Summary
from experiments.report.tables import AVERAGE, MainTable, difference, lines, status

LATEX = {
    "\\": r"\textbackslash{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "°": r"$^\circ$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "—": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
CSV_HEADER = (
    "row",
    "method",
    "task",
    "origin",
    "status",
    "metric",
    "mean_percent",
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


def latex(table: MainTable, caption: str, label: str, notes: Sequence[str]) -> str:
    """The main table as a LaTeX table that needs the packages booktabs and graphicx."""
    header = ["method", "result", *table.grid.tasks, AVERAGE]
    body: list[str] = []
    printed = lines(table)
    grouped = len(printed) > len(table.grid.rows)
    previous = None
    for line in printed:
        body += [r"\addlinespace"] if grouped and previous not in (None, line.label) else []
        name = "" if line.label == previous else line.label
        body.append(" & ".join(escape(text) for text in (name, line.origin, *line.texts)) + r" \\")
        previous = line.label
    content = [
        "% needs \\usepackage{booktabs} and \\usepackage{graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        rf"\label{{tab:{label}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}",
        r"\toprule",
        " & ".join(map(escape, header)) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\par\footnotesize {escape(note)}" for note in notes),
        r"\end{table}",
    ]
    return "\n".join(content) + "\n"


def _numbers(summary: Summary | None) -> list[str]:
    if summary is None:
        return ["", "", "0", "", ""]
    texts = ["" if x is None else f"{x:.4f}" for x in (summary.mean, summary.std, summary.low, summary.high)]
    return [*texts[:2], str(summary.n) if summary.n else "", *texts[2:]]


def _csv_ours(table: MainTable, row: Row) -> list[list[str]]:
    result = []
    for task, cell in row.cells.items():
        delta = difference(table, row, task)
        counts = [str(cell.count("failed")), str(cell.count("diverged")), str(cell.random_level)]
        metric = cell.entries[0].metric if cell.entries else ""
        tail = ["" if delta is None else f"{delta:.4f}", "", "", ""]
        start = [row.label, row.method, task, "ours", status(cell), metric]
        result.append([*start, *_numbers(cell.summary), *counts, *tail])
    start = [row.label, row.method, AVERAGE, "ours", "finished" if row.average else "incomplete", ""]
    return [*result, [*start, *_numbers(row.average), *[""] * 7]]


def _csv_published(table: MainTable, row: PublishedRow) -> list[list[str]]:
    result = []
    for task in (*table.grid.tasks, AVERAGE):
        mean, std = row.cells.get(task, (None, None))
        numbers = ["" if x is None else f"{x:.2f}" for x in (mean, std)]
        tail = [" ".join(row.source), str(row.from_memory).lower(), f"{row.confidence:g}"]
        printed = "published" if mean is not None else "not known"
        start = [row.method, row.method, task, row.title, printed, ""]
        result.append([*start, *numbers, *[""] * 7, *tail])
    return result


def csv_text(table: MainTable) -> str:
    """One line a cell: ours, then what the papers print."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for row in table.grid.rows:
        writer.writerows(_csv_ours(table, row))
    for paper in table.published:
        writer.writerows(_csv_published(table, paper))
    return buffer.getvalue()
