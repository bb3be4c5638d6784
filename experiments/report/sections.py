"""A table below the main one, in the three forms: Markdown for the page, LaTeX, and lines of a long CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from experiments.report.exports import csv_lines, latex_line, latex_table
from experiments.report.tables import markdown

CSV_HEADER = ("table", "row", "quantity", "value")


@dataclass(frozen=True)
class Section:
    """A titled table whose first `words` columns name its rows, with a legend, notes and the names of its pictures."""

    key: str
    title: str
    header: Sequence[str]
    body: Sequence[Sequence[str]]
    words: int = 1
    legend: str = ""
    notes: Sequence[str] = ()
    pictures: Sequence[str] = ()

    def page(self, folder: str) -> str:
        """Markdown; `folder` is where the pictures are, seen from the page."""
        parts = [f"## {self.title}\n"]
        parts += [f"{self.legend}\n"] if self.legend else []
        parts += [markdown(self.header, self.body, self.words)] if self.body else []
        parts += ["\n".join(f"- {note}" for note in self.notes) + "\n"] if self.notes else []
        pictures = "\n".join(f"![{name}]({folder}/{name}.png)" for name in self.pictures)
        parts += [f"{pictures}\n"] if pictures else []
        return "\n".join(parts)


def latex(sections: Iterable[Section], caption: str, label: str) -> str:
    """The tables as LaTeX, one after another; bold is of Markdown alone."""
    parts = []
    for section in sections:
        if section.body:
            body = [latex_line([text.replace("**", "") for text in line]) for line in section.body]
            notes = [text for text in (section.legend, *section.notes) if text]
            title, key = f"{caption}: {section.title}", f"{label}-{section.key}"
            parts.append(latex_table(section.header, body, title, key, notes, section.words))
    return "\n".join(parts)


def csv_text(sections: Iterable[Section]) -> str:
    """Every number of every table on a line of its own."""
    rows = []
    for section in sections:
        for line in section.body:
            row = " | ".join(line[: section.words])
            numbers = zip(section.header[section.words :], line[section.words :], strict=True)
            rows += [[section.key, row, quantity, text.replace("**", "")] for quantity, text in numbers]
    return csv_lines([CSV_HEADER, *rows])
