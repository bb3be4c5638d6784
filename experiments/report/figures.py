"""Convergence: training loss, and held-out loss where it was measured, against steps, tokens and seconds.

One picture a task against steps, one against what was spent; mean over seeds, band from the lowest to the highest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.drawing import canvas, grid_lines, legend_below, logarithmic, look, style
from experiments.report.flags import main_machine, on_machine
from experiments.report.grid import Cell, Grid, Row
from experiments.report.statistics import smooth
from lora_ga.records import RunRecord

TRAINING = "training loss"
HELD_OUT = "held_out_loss"
KEEP = 0.9  # of the moving average: about the last ten steps
STEPS, TOKENS, SECONDS = "optimizer step", "tokens trained on", "seconds, initialisation included"

Curve = Mapping[int, float]  # optimizer step -> loss, or what was spent until then


def training_loss(record: RunRecord) -> Curve:
    """The loss of each step, smoothed."""
    smoothed = smooth([row["loss"] for row in record.loss_curve], KEEP)
    return {int(row["step"]): float(loss) for row, loss in zip(record.loss_curve, smoothed, strict=True)}


def held_out_loss(record: RunRecord) -> Curve:
    """The loss on held-out rows where training measured it, and before the first step; empty for older records."""
    measured = {int(row["step"]): row[HELD_OUT] for row in record.loss_curve if HELD_OUT in row}
    start = record.step0.get(HELD_OUT)
    return {0: start, **measured} if measured and start is not None else measured


def spent(record: RunRecord, axis: str) -> Curve:
    """Steps, tokens or seconds until each step; seconds count what a method does before its first one."""
    key, start = {STEPS: ("step", 0.0), TOKENS: ("tokens", 0.0), SECONDS: ("seconds", 0.0)}[axis]
    if axis == SECONDS:
        start = record.cost.get("init_seconds", 0.0)
    rows = [row for row in record.loss_curve if key in row]
    return {0: start, **{int(row["step"]): start + row[key] for row in rows}} if rows else {}


Kinds = Mapping[str, Callable[[RunRecord], Curve]]  # what is drawn upwards, by its words
KINDS: Kinds = {TRAINING: training_loss, "held-out loss": held_out_loss}


@dataclass(frozen=True)
class Line:
    """A row's curve: where, (points,), and the losses there, (seeds, points)."""

    row: Row
    x: np.ndarray
    losses: np.ndarray


def _line(row: Row, cell: Cell, curve: Callable[[RunRecord], Curve], axis: str, machine: str | None) -> Line | None:
    """At the steps that every finished seed has; None if there are none."""
    known = [entry.record for entry in cell.finished if machine is None or on_machine(entry, machine)]
    if not known or cell.repeated_seeds:
        return None
    losses, places = [curve(record) for record in known], [spent(record, axis) for record in known]
    steps = sorted(set.intersection(*map(set, [*losses, *places])))
    if not steps:
        return None
    x = np.array([[place[step] for step in steps] for place in places]).mean(0)
    return Line(row, x, np.array([[loss[step] for step in steps] for loss in losses]))


def _lines(grid: Grid, task: str, curve: Callable[[RunRecord], Curve], axis: str) -> list[Line]:
    machine = main_machine(grid) if axis == SECONDS else None
    found = [_line(row, row.tasks[task], curve, axis, machine) for row in grid.rows]
    return [line for line in found if line is not None]


def _panel(axes: Axes, grid: Grid, task: str, words: str, axis: str, lines: Sequence[Line]) -> None:
    every = 0.1 if words == TRAINING else None  # markers: ten a line, or one a measurement
    for line in lines:
        variant = [row for row in grid.rows if row.method == line.row.method].index(line.row)
        drawn = look([row.method for row in grid.rows], line.row.method, variant)
        label = f"{line.row.label}, n={len(line.losses)}"
        axes.plot(line.x, line.losses.mean(0), label=label, zorder=3, markevery=every, **drawn)
        if len(line.losses) > 1:
            low, high = line.losses.min(0), line.losses.max(0)
            axes.fill_between(line.x, low, high, color=drawn["color"], alpha=0.15, linewidth=0)
    # The prompt's form is learned in a few steps that would press everything after them to the floor.
    log = logarithmic(axes, [float(value) for line in lines for value in (line.losses.min(), line.losses.max())])
    several = max(len(line.losses) for line in lines) > 1
    axes.set_title(f"{task}{': mean, band min to max over seeds' if several else ''}", fontsize=7)
    axes.set_xlabel(axis)
    notes = [f"moving average, decay {KEEP:g}"] if words == TRAINING else []
    notes += ["log scale"] if log else []
    axes.set_ylabel(words + (f"\n({', '.join(notes)})" if notes else ""))
    grid_lines(axes)


def draw(grid: Grid, task: str, axes: Sequence[str] = (STEPS,), drawn: Kinds = KINDS) -> Figure | None:
    """A panel for each kind of curve and each of `axes`; None if no finished run has any."""
    found = {(words, axis): _lines(grid, task, drawn[words], axis) for axis in axes for words in drawn}
    panels = {key: lines for key, lines in found.items() if lines}
    if not panels:
        return None
    kinds, across = list(dict.fromkeys(words for words, _ in panels)), list(dict.fromkeys(axis for _, axis in panels))
    figure = canvas(len(across), len(kinds))
    for (words, axis), lines in panels.items():
        place = across.index(axis) * len(kinds) + kinds.index(words) + 1
        _panel(figure.add_subplot(len(across), len(kinds), place), grid, task, words, axis, lines)
    legend_below(figure, len(kinds))
    return figure


def loss_figures(grid: Grid, name: str) -> tuple[dict[str, str], dict[str, Figure]]:
    """The picture of each task with a loss curve, and all pictures, by name.

    What was spent is drawn where a method has one line: of a search it would say nothing that the steps do not.
    """
    by_task, figures = {}, {}
    with style():
        for task in grid.tasks:
            steps = draw(grid, task)
            if steps is None:
                continue
            by_task[task] = f"{name}-{task}"
            figures[by_task[task]] = steps
            searched = any(row.rate is not None for row in grid.rows)
            budget = None if searched else draw(grid, task, (TOKENS, SECONDS))
            if budget is not None:
                figures[f"{name}-{task}-budget"] = budget
    return by_task, figures
