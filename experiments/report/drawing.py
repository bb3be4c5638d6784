"""How every picture looks and is written: palette, style, and bytes that depend on nothing but the records."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from experiments.report.grid import METHODS, in_order

# Okabe and Ito, https://jfly.uni-koeln.de/color/: told apart by colour-blind readers; the yellow is too pale on white.
COLOURS = ("#000000", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#D55E00", "#56B4E9")
PROMINENT = ("full_ft", "lora", "lora_ga", "lora_one", "lora_pro")  # told apart by colour alone
MARKERS = ("", "o", "^", "s", "x")
POINTS = ("o", "^", "s", "D", "v", "P", "X")  # where there is no line, shape tells what colour may not
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
DPI = 300
PANEL = (3.4, 3.0)  # inches: a paper's column
STYLE = {
    "font.size": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 2.5,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "pdf.fonttype": 42,  # text stays text
}


def look(methods: Iterable[str], method: str, variant: int = 0) -> dict[str, Any]:
    """Colour and marker tell the method, in every picture the same; dashes tell its variants apart."""
    place = _place(methods, method)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place // len(COLOURS) % len(MARKERS)],
        "linestyle": DASHES[variant % len(DASHES)],
    }


def point(methods: Iterable[str], method: str) -> dict[str, Any]:
    """Colour and shape of a method's point."""
    place = _place(methods, method)
    return {"color": COLOURS[place % len(COLOURS)], "marker": POINTS[place % len(POINTS)], "markersize": 4}


def _place(methods: Iterable[str], method: str) -> int:
    first = [*PROMINENT, *(name for name in METHODS if name not in PROMINENT)]
    return in_order({*methods, *METHODS}, first).index(method)


def canvas(rows: int, columns: int, height: float = PANEL[1]) -> Figure:
    """A figure of that many panels, each a column wide."""
    figure = Figure(figsize=(PANEL[0] * columns, height * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def logarithmic(axes: Axes, values: Sequence[float]) -> bool:
    """Whether the y axis was made logarithmic: where its values span more than a factor of ten."""
    if not (min(values) > 0 and max(values) / min(values) > 10):
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True


def grid_lines(axes: Axes) -> None:
    axes.grid(True, which="major", color="#dddddd", linewidth=0.4)


def legend_below(figure: Figure, columns: int) -> None:
    """One legend for all panels, each label once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(map(str, labels), handles, strict=True))
    each = columns * (3 if max(map(len, found)) <= 16 else 2)
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=each, fontsize=6)


def _save(figure: Figure, path: Path) -> None:
    """Write through a temporary file, without dates or versions."""
    buffer = io.BytesIO()
    metadata = (
        {"Software": None} if path.suffix == ".png" else {"CreationDate": None, "Producer": None, "Creator": None}
    )
    figure.savefig(buffer, format=path.suffix[1:], metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def save(figures: Mapping[str, Figure], folder: Path) -> None:
    """Write <name>.png and <name>.pdf for each figure."""
    with matplotlib.style.context(["default", STYLE]):
        for name, figure in figures.items():
            _save(figure, folder / f"{name}.png")
            _save(figure, folder / f"{name}.pdf")


def style() -> Any:
    """The context that figures are drawn in."""
    return matplotlib.style.context(["default", STYLE])
