"""Convergence: training loss, and held-out loss where it was measured, against optimizer steps, one picture a task.

The same records give the same bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
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
from lora_ga.records import RunRecord

TRAINING = "training loss"
HELD_OUT = "held_out_loss"
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


Curve = dict[int, float]  # optimizer step -> loss


def training_loss(record: RunRecord) -> Curve:
    """The loss of each step, smoothed."""
    smoothed = smooth([row["loss"] for row in record.loss_curve], KEEP)
    return {int(row["step"]): float(loss) for row, loss in zip(record.loss_curve, smoothed, strict=True)}


def held_out_loss(record: RunRecord) -> Curve:
    """The loss on held-out rows where training measured it, and before the first step; empty for older records."""
    measured = {int(row["step"]): row[HELD_OUT] for row in record.loss_curve if HELD_OUT in row}
    start = record.step0.get(HELD_OUT)
    return {0: start, **measured} if measured and start is not None else measured


KINDS: dict[str, Callable[[RunRecord], Curve]] = {TRAINING: training_loss, "held-out loss": held_out_loss}


def _seeds(cell: Cell, curve: Callable[[RunRecord], Curve]) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps that every finished seed has, (steps,), and the losses there, (seeds, steps)."""
    by_seed = [curve(entry.record) for entry in cell.finished]
    steps = sorted(set.intersection(*map(set, by_seed))) if by_seed and not cell.repeated_seeds else []
    return (np.array(steps), np.array([[losses[step] for step in steps] for losses in by_seed])) if steps else None


def _lines(grid: Grid, task: str, curve: Callable[[RunRecord], Curve]) -> list[tuple[Row, np.ndarray, np.ndarray]]:
    found = [(row, _seeds(row.tasks[task], curve)) for row in grid.rows]
    return [(row, *curves) for row, curves in found if curves is not None]


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


def _finish(axes: Axes, title: str, words: str, losses: Sequence[np.ndarray]) -> None:
    low, high = min(float(loss.min()) for loss in losses), max(float(loss.max()) for loss in losses)
    # The prompt's form is learned in a few steps that would press everything after them to the floor.
    logarithmic = low > 0 and high / low > 10
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{title}{': mean, band min to max over seeds' if max(map(len, losses)) > 1 else ''}", fontsize=7)
    axes.set_xlabel("optimizer step")
    notes = [f"moving average, decay {KEEP:g}"] if words == TRAINING else []
    notes += ["log scale"] if logarithmic else []
    axes.set_ylabel(words + (f"\n({', '.join(notes)})" if notes else ""))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.4)


def _panel(axes: Axes, grid: Grid, task: str, words: str, lines: Sequence[tuple[Row, np.ndarray, np.ndarray]]) -> None:
    every = 0.1 if words == TRAINING else None  # markers: ten a line, or one a measurement
    for row, steps, losses in lines:
        look = _look(grid.rows, row)
        axes.plot(steps, losses.mean(0), label=f"{row.label}, n={len(losses)}", zorder=3, markevery=every, **look)
        if len(losses) > 1:
            axes.fill_between(steps, losses.min(0), losses.max(0), color=look["color"], alpha=0.15, linewidth=0)
    _finish(axes, task, words, [losses for _, _, losses in lines])


def draw(grid: Grid, task: str) -> Figure | None:
    """The picture of one task, a paper's column wide for each kind of loss; None if no finished run has any."""
    kinds = {words: _lines(grid, task, curve) for words, curve in KINDS.items()}
    panels = {words: lines for words, lines in kinds.items() if lines}
    if not panels:
        return None
    figure = Figure(figsize=(3.4 * len(panels), 3.0), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    legend: dict[str, Any] = {}
    for place, (words, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        _panel(axes, grid, task, words, lines)
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(map(str, labels), handles, strict=True))
    columns = len(panels) * (3 if max(map(len, legend)) <= 16 else 2)
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=columns, fontsize=6)
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
