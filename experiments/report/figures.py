"""Convergence: training loss against optimizer steps, one picture a task, the same bytes from the same records."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from experiments.report.grid import METHODS, Cell, Grid, Row, in_order
from experiments.report.statistics import smooth

KEEP = 0.9  # of the moving average: about the last ten steps
# Okabe and Ito, https://jfly.uni-koeln.de/color/: told apart by colour-blind readers; the yellow is too pale on white.
COLOURS = ("#000000", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#D55E00", "#56B4E9")
PROMINENT = ("full_ft", "lora", "lora_ga", "lora_one", "lora_pro")  # told apart by colour alone
MARKERS = ("", "o", "^", "s", "x")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
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


def _curves(cell: Cell) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps that every finished seed has, (steps,), and the smoothed losses there, (seeds, steps)."""
    by_seed = []
    for entry in cell.finished:
        rows = entry.record.loss_curve
        smoothed = smooth([row["loss"] for row in rows], KEEP)
        by_seed.append({int(row["step"]): float(loss) for row, loss in zip(rows, smoothed, strict=True)})
    steps = sorted(set.intersection(*map(set, by_seed))) if by_seed and not cell.repeated_seeds else []
    return (np.array(steps), np.array([[losses[step] for step in steps] for losses in by_seed])) if steps else None


def _look(rows: Sequence[Row], row: Row) -> dict[str, Any]:
    """Colour and marker tell the method, in every picture the same; dashes tell its learning rates apart."""
    first = [*PROMINENT, *(method for method in METHODS if method not in PROMINENT)]
    place = in_order({other.method for other in rows} | set(METHODS), first).index(row.method)
    variant = [other for other in rows if other.method == row.method].index(row)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place // len(COLOURS) % len(MARKERS)],
        "linestyle": DASHES[variant % len(DASHES)],
    }


def _finish(axes: Axes, task: str, losses: Sequence[np.ndarray], several_seeds: bool) -> None:
    low, high = min(float(loss.min()) for loss in losses), max(float(loss.max()) for loss in losses)
    # The prompt's form is learned in a few steps that would press everything after them to the floor.
    logarithmic = low > 0 and high / low > 10
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{task}{': mean, band min to max over seeds' if several_seeds else ''}", fontsize=7)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"training loss\n(moving average, decay {KEEP:g}{', log scale' if logarithmic else ''})")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.4)


def draw(grid: Grid, task: str) -> Figure | None:
    """The picture of one task at the width of a paper's column; None if no finished run has a loss curve."""
    figure = Figure(figsize=(3.4, 3.0), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn: list[np.ndarray] = []
    for row in grid.rows:
        curves = _curves(row.cells[task])
        if curves is None:
            continue
        steps, losses = curves
        look = _look(grid.rows, row)
        axes.plot(steps, losses.mean(0), label=f"{row.label}, n={len(losses)}", zorder=3, markevery=0.1, **look)
        if len(losses) > 1:
            axes.fill_between(steps, losses.min(0), losses.max(0), color=look["color"], alpha=0.15, linewidth=0)
        drawn.append(losses)
    if not drawn:
        return None
    _finish(axes, task, drawn, any(len(losses) > 1 for losses in drawn))
    longest = max(len(str(text)) for text in axes.get_legend_handles_labels()[1])
    figure.legend(loc="outside lower center", ncols=3 if longest <= 16 else 2, fontsize=6)
    return figure


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


def write_figures(grid: Grid, folder: Path, name: str) -> dict[str, Path]:
    """Write <name>-<task>.png and .pdf for each task with a loss curve; maps the task to its PNG."""
    written = {}
    with matplotlib.style.context(["default", STYLE]):
        for task in grid.tasks:
            figure = draw(grid, task)
            if figure is not None:
                written[task] = folder / f"{name}-{task}.png"
                _save(figure, written[task])
                _save(figure, written[task].with_suffix(".pdf"))
    return written
