"""How far each method's steps followed the full gradient, where runs measured it (lora_ga/alignment.py says what)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.report.drawing import style
from experiments.report.figures import Curve, Kinds, draw
from experiments.report.grid import Grid
from experiments.report.sections import Section
from experiments.report.traced import traced
from lora_ga.records import RunRecord

QUANTITIES = {"alignment": "alignment", "captured": "captured energy"}
LEGEND = (
    "Alignment: cosine between the descent direction of the full gradient and the step's change of the adapted "
    "weights, of all layers at once; 1 is a step of gradient descent on the weights themselves. Captured energy: the "
    "share of the gradient's squared norm in the tangent space of the adapters, to which a small step is bound: its "
    "alignment is at most the root of it. Both against the gradient of the step's own batch. A step whose learning "
    "rate is zero has no alignment. First and last measured step, and mean over all measured ones; then the mean over "
    "seeds."
)


def _curve(name: str) -> Callable[[RunRecord], Curve]:
    return lambda record: {int(row["step"]): row[name] for row in record.loss_curve if name in row}


CURVES: Kinds = {words: _curve(name) for name, words in QUANTITIES.items()}


def _numbers(curves: Sequence[Curve]) -> list[str]:
    """First, mean and last of each seed's curve, averaged over the seeds that have one."""
    known = [[curve[step] for step in sorted(curve)] for curve in curves if curve]
    each = np.array([[values[0], np.mean(values), values[-1]] for values in known])
    return [f"{value:.4f}" for value in each.mean(0)] if known else ["—"] * 3


def alignment(grid: Grid, name: str) -> tuple[Section | None, dict[str, Figure]]:
    """The table with a picture of each task, and the pictures by name; None where no run measured its steps."""
    body, figures = [], {}
    for task in grid.tasks:
        for row in grid.rows:
            runs = row.tasks[task]
            measured = [] if runs.repeated_seeds else list(runs.finished)
            curves = [[curve(entry.record) for entry in measured] for curve in CURVES.values()]
            seeds = sum(any(both) for both in zip(*curves, strict=True))
            if seeds:
                texts = [str(seeds), *(text for each in curves for text in _numbers(each))]
                body.append([row.label, task, *traced(texts, measured)])
        with style():
            figure = draw(grid, task, drawn=CURVES)
        if figure is not None:
            figures[f"{name}-{task}-alignment"] = figure
    if not body:
        return None, {}
    of = [f"{words}, {part}" for words in QUANTITIES.values() for part in ("first", "mean", "last")]
    header, title = ["method", "task", "seeds", *of], "Steps against their full gradient"
    return Section("alignment", title, header, body, 2, LEGEND, (), tuple(figures)), figures
