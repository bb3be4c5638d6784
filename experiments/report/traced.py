"""The text of a table's cell that knows the records behind it; Markdown, LaTeX and CSV take it for any other text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from experiments.report.loading import Entry


class Traced(str):
    """A cell's text, each record it was computed from once, and whether it is the best of its line."""

    entries: tuple[Entry, ...]
    best: bool

    def __new__(cls, text: str, entries: Iterable[Entry], best: bool = False) -> Self:
        known = super().__new__(cls, text)
        known.entries = tuple({(entry.folder, entry.file): entry for entry in entries}.values())
        known.best = best
        return known


def traced(texts: Iterable[str], entries: Iterable[Entry]) -> list[Traced]:
    """Cells that were all computed from the same records."""
    known = list(entries)
    return [Traced(text, known) for text in texts]
