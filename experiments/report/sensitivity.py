"""How a method's result depends on its learning rate and on its rank: one table and one picture for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.columns import LOSSES, Column
from experiments.report.drawing import canvas, grid_lines, legend_below, logarithmic, look, style
from experiments.report.grid import Grid, Row, in_order, rank, rate_text
from experiments.report.loading import Entry
from experiments.report.sections import Section
from experiments.report.statistics import Summary, summarise
from experiments.report.tables import NOT_RUN, summary_text
from experiments.report.traced import Traced


@dataclass(frozen=True)
class Dial:
    """What is turned: its values in the records, how one is written, and how its axis is drawn."""

    key: str
    title: str
    axis: str
    value: Callable[[Entry], float | None]
    text: Callable[[float], str]
    held: Callable[[Entry], float | None]  # kept apart: a rank sweep at two learning rates is two lines


RATE = Dial("rates", "Learning-rate sensitivity", "learning rate", lambda e: e.record.learning_rate, rate_text, rank)
RANK = Dial("ranks", "Rank sweep", "rank", rank, lambda value: f"{value:g}", lambda e: e.record.learning_rate)


@dataclass(frozen=True)
class Curve:
    """One line of a table or picture: a summary over seeds for each value of the dial."""

    method: str
    held: float | None
    label: str
    points: Mapping[float, Summary]
    runs: Mapping[float, Sequence[Entry]]


def _column(grid: Grid, task: str) -> Column:
    """The loss on the scored rows where there is one, else the headline metric."""
    entries = [entry for entry in grid.entries if entry.finished and entry.record.task == task]
    found = (name for name in LOSSES if any(name in entry.record.metrics for entry in entries))
    headline = next(column for column in grid.columns if column.task == task)
    return Column(task, next(found, headline.metric))


def curves(rows: Sequence[Row], column: Column, dial: Dial) -> list[Curve]:
    """The methods that were run at several values of the dial; a seed that a value holds twice gives no number."""
    runs: dict[tuple[str, float | None], dict[float, list[Entry]]] = {}
    for entry in (entry for row in rows for entry in row.entries):
        value = dial.value(entry)
        if value is not None and entry.finished and entry.record.task == column.task:
            runs.setdefault((entry.record.method, dial.held(entry)), {}).setdefault(value, []).append(entry)
    found = []
    for (method, held), by_value in runs.items():
        points: dict[float, Summary] = {}
        for value in sorted(by_value):
            seeds = [entry.record.seed for entry in by_value[value]]
            known = [shown for entry in by_value[value] if (shown := entry.shown(column.metric)) is not None]
            summary = summarise(known) if len(seeds) == len(set(seeds)) else None
            points |= {value: summary} if summary else {}
        if len(points) > 1:
            several = sum(other == method for other, _ in runs) > 1
            label = f"{method} ({held:g})" if several and held is not None else method
            found.append(Curve(method, held, label, points, by_value))
    return found


def _best(curve: Curve, column: Column) -> float:
    sign = 1 if column.unit.lower_is_better else -1
    return min(curve.points, key=lambda value: (sign * curve.points[value].mean, value))


def _body(found: Sequence[Curve], column: Column, dial: Dial, values: Sequence[float]) -> list[list[str]]:
    body = []
    for curve in found:
        texts = []
        for value in values:
            known = curve.points.get(value)
            text = summary_text(known, column.unit) if known else NOT_RUN
            texts.append(Traced(text, curve.runs.get(value, ()), best=value == _best(curve, column)))
        body.append([curve.label, column.task, *texts])
    return body


def _panel(axes: Axes, found: Sequence[Curve], column: Column, dial: Dial) -> None:
    methods, means = [curve.method for curve in found], []
    for curve in found:
        variant = [other for other in found if other.method == curve.method].index(curve)
        drawn = look(methods, curve.method, variant)
        values, points = list(curve.points), list(curve.points.values())
        axes.plot(values, [point.mean for point in points], label=curve.label, zorder=3, **drawn)
        best = _best(curve, column)
        axes.plot([best], [curve.points[best].mean], marker="*", markersize=6, color=drawn["color"], zorder=4)
        spreads = [point.std or 0.0 for point in points]
        if any(spreads):
            low = [point.mean - spread for point, spread in zip(points, spreads, strict=True)]
            high = [point.mean + spread for point, spread in zip(points, spreads, strict=True)]
            axes.fill_between(values, low, high, color=drawn["color"], alpha=0.15, linewidth=0)
        means += [point.mean for point in points]
    axes.set_xscale("log", base=2 if dial is RANK else 10)
    log = logarithmic(axes, means)
    several = any(point.n > 1 for curve in found for point in curve.points.values())
    axes.set_title(f"{column.task}: star at the best{', band of one std over seeds' if several else ''}", fontsize=7)
    axes.set_xlabel(dial.axis)
    axes.set_ylabel(f"{column.words} ({column.unit.words})" + ("\n(log scale)" if log else ""))
    grid_lines(axes)


def sensitivity(grid: Grid, name: str, dial: Dial) -> tuple[Section | None, dict[str, Figure]]:
    """Table and picture over all tasks; nothing where no method was run at several values of the dial."""
    by_column = {_column(grid, task): curves(grid.rows, _column(grid, task), dial) for task in grid.tasks}
    known = {column: found for column, found in by_column.items() if found}
    if not known:
        return None, {}
    values = sorted({value for found in known.values() for curve in found for value in curve.points})
    body = [line for column, found in known.items() for line in _body(found, column, dial, values)]
    metrics = in_order((f"{column.words} in {column.unit.words}" for column in known), ())
    splits = in_order((str((e.record.data.get("scored") or {}).get("split", "test")) for e in grid.entries), ())
    legend = f"{'; '.join(metrics)}, {' and '.join(splits)} rows, mean ± std over seeds; the best of a line in bold."
    across = min(2, len(known))
    with style():
        figure = canvas(math.ceil(len(known) / across), across)
        for place, (column, found) in enumerate(known.items(), start=1):
            axes = figure.add_subplot(math.ceil(len(known) / across), across, place)
            _panel(axes, found, column, dial)
        legend_below(figure, across)
    picture = f"{name}-{dial.key}"
    header = ["method", "task", *map(dial.text, values)]
    return Section(dial.key, dial.title, header, body, 2, legend, (), (picture,)), {picture: figure}
