"""The whole report as one HTML file, from the same pages as the Markdown: every table sortable, every number leading to
the records behind it, figures inline. web/ holds template, style and script; the file asks the network for nothing.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from experiments.report.drawing import DPI
from experiments.report.grid import rate_text
from experiments.report.loading import Entry
from experiments.report.sections import Page, is_best
from experiments.report.tables import GREY, GREY_END, NOT_RUN
from experiments.report.traced import Traced

WEB = Path(__file__).with_name("web")
# What a cell is sorted by: the number it starts with, so the mean of "89.58 ± 1.26 (n=3)", the low end of an interval.
NUMBER = re.compile(rf"[\[{GREY}]?([+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(?![\w.])")
SCREEN = 134  # pixels of the page for an inch of a figure: 1.4 times its size in print
MISSING = ("", "—", NOT_RUN)


@dataclass(frozen=True)
class Link:
    """A record, seen from the report."""

    href: str
    words: str
    file: str


@dataclass(frozen=True)
class Cell:
    """What the template needs of a cell; `number` is what it is sorted by, "" for words."""

    text: Markup
    number: str
    missing: bool
    best: bool
    links: tuple[Link, ...]


def _link(entry: Entry, out: Path) -> Link:
    path = Path(os.path.relpath(entry.folder / entry.file, out)).as_posix()
    run = entry.record
    return Link(quote(path), f"{run.task}, {run.method}, {rate_text(run.learning_rate)}, seed {run.seed}", entry.file)


def _cell(text: str, out: Path) -> Cell:
    found = NUMBER.match(text)
    number = found[1].replace(",", "") if found else ""
    links = tuple(_link(entry, out) for entry in text.entries) if isinstance(text, Traced) else ()
    return Cell(_grey(text), number, text in MISSING, is_best(text), links)


def _grey(text: str) -> Markup:
    """Escaped; grey what memory alone vouches for."""
    marked = escape(text).replace(GREY, Markup('<span class="memory">'))
    return marked.replace(GREY_END, Markup("</span>"))


def _picture(name: str, out: Path) -> Markup:
    """Source and width of a figure that lies in <out>/figures: on a screen larger than in print."""
    content = (out / "figures" / f"{name}.png").read_bytes()
    width = int.from_bytes(content[16:20], "big") * SCREEN // DPI  # PNG's first chunk begins with it
    encoded = base64.b64encode(content).decode()
    return Markup('src="data:image/png;base64,{}" width="{}"').format(encoded, width)


def html(pages: Sequence[Page], out: Path) -> str:
    """The file's text; `out` is the folder it will lie in, from which links to records are relative."""
    environment = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": partial(_cell, out=out), "picture": partial(_picture, out=out)}
    return environment.get_template("report.html.jinja").render(pages=pages)
