"""A page and its tables, from which Markdown and HTML are made; the tables below the main one as LaTeX and long CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from experiments.report.exports import csv_lines, latex_line, latex_table
from experiments.report.tables import markdown
from experiments.report.traced import Traced

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

    def markdown(self, folder: str, level: int = 2) -> str:
        """Markdown; `folder` is where the pictures are, seen from the page."""
        parts = [f"{'#' * level} {self.title}\n"]
        parts += [f"{self.legend}\n"] if self.legend else []
        body = [[f"**{text}**" if is_best(text) else text for text in line] for line in self.body]
        parts += [markdown(self.header, body, self.words)] if body else []
        parts += ["\n".join(f"- {note}" for note in self.notes) + "\n"] if self.notes else []
        pictures = "\n".join(f"![{name}]({folder}/{name}.png)" for name in self.pictures)
        parts += [f"{pictures}\n"] if pictures else []
        return "\n".join(parts)


@dataclass(frozen=True)
class Page:
    """All that is said of an experiment: what stands under its title, with the main table if any, then the rest."""

    name: str
    opening: Section
    sections: Sequence[Section]

    def markdown(self) -> str:
        """As it lies in tables/, beside figures/."""
        below = (section.markdown("../figures") for section in self.sections)
        return "\n".join([self.opening.markdown("../figures", level=1), *below])


def is_best(text: str) -> bool:
    return isinstance(text, Traced) and text.best


def latex(sections: Iterable[Section], caption: str, label: str) -> str:
    """The tables as LaTeX, one after another."""
    parts = []
    for section in sections:
        if section.body:
            body = [latex_line(line) for line in section.body]
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
            rows += [[section.key, row, quantity, text] for quantity, text in numbers]
    return csv_lines([CSV_HEADER, *rows])
