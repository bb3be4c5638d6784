"""What the methods cost, and which of them no other beats in quality and cost at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from experiments.report.columns import PERCENT, Column, Unit
from experiments.report.drawing import canvas, grid_lines, legend_below, point, style
from experiments.report.flags import hardware, machine, main_machine
from experiments.report.grid import Grid, Row, in_order
from experiments.report.loading import Entry
from experiments.report.sections import Section
from experiments.report.traced import Traced, traced
from lora_ga.records import RunRecord

COSTS = {
    "train_seconds": "train seconds",
    "total_seconds": "total seconds",
    "peak_memory_mb": "peak memory MB",
    "trainable_parameters": "trainable parameters",
    "optimizer_state_mb": "optimizer state MB",
    "init_seconds": "initialisation seconds",
}
SPEEDS = {
    "classified_rows_per_second": "rows classified a second",
    "generated_tokens_per_second": "tokens generated a second",
}
FRONTS = {"peak_memory_mb": "peak memory, MB", "train_seconds": "training, seconds"}


def mean_cost(records: Sequence[RunRecord], name: str) -> float | None:
    """Over the records that hold it."""
    values = [record.cost[name] for record in records if record.cost.get(name) is not None]
    return sum(values) / len(values) if values else None


def _line(label: str, entries: Sequence[Entry], names: Iterable[str]) -> list[str]:
    records = [entry.record for entry in entries]
    texts = [str(len(records))]
    for name in names:
        value, digits = mean_cost(records, name), 0 if name == "trainable_parameters" else 1
        texts.append("—" if value is None else f"{value:,.{digits}f}")
    return [label, *traced(texts, entries)]


def costs(grid: Grid) -> Section:
    """Mean costs, never over different machines; speeds of scoring where a record has them."""
    machines, body = hardware(grid), []
    held = {name for entry in grid.entries if entry.finished for name in entry.record.cost}
    shown = COSTS | {name: heading for name, heading in SPEEDS.items() if name in held}
    for row in grid.rows:
        for place, text in enumerate(machines, start=1):
            entries = [entry for entry in row.entries if entry.finished and machine(entry) == text]
            if entries:
                body.append(_line(row.label + (f" [{place}]" if len(machines) > 1 else ""), entries, shown))
    commits = in_order((str(entry.record.environment.get("git_commit")) for entry in grid.entries), ())
    dirty = any(entry.record.environment.get("git_dirty") for entry in grid.entries)
    listed = [f"[{place}] {text}" for place, text in enumerate(machines, start=1)] if len(machines) > 1 else machines
    notes = [
        f"Hardware: {'; '.join(listed) or 'none'}.",
        f"Commits: {', '.join(commits) or 'none'}{' (dirty tree)' if dirty else ''}.",
    ]
    return Section("cost", "Cost, mean over finished runs", ["method", "runs", *shown.values()], body, 1, "", notes)


@dataclass(frozen=True)
class Place:
    """Where a method stands: its quality, and what one cost of it was on the machine compared; the runs of each."""

    row: Row
    quality: float
    cost: float
    scored: tuple[Entry, ...] = ()
    timed: tuple[Entry, ...] = ()


def front(places: Sequence[Place], lower_is_better: bool) -> list[Place]:
    """Those that no other beats in quality and cost at once (better in one, at least as good in the other)."""
    sign = -1 if lower_is_better else 1

    def beaten(one: Place) -> bool:
        return any(
            other.cost <= one.cost
            and sign * other.quality >= sign * one.quality
            and (other.cost, other.quality) != (one.cost, one.quality)
            for other in places
        )

    return sorted((place for place in places if not beaten(place)), key=lambda place: place.cost)


def _qualities(grid: Grid) -> dict[str, tuple[Column | None, Unit]]:
    """The average where there is one, else every column; None stands for the average."""
    if grid.averaged and len(grid.columns) > 1:
        return {"average": (None, PERCENT)}
    return {grid.heading(column): (column, column.unit) for column in grid.columns if column.metric}


def _places(grid: Grid, column: Column | None, cost: str, on: str) -> list[Place]:
    found = []
    for row in grid.rows:
        summary = row.average if column is None else row.cells[column].summary
        timed = tuple(entry for entry in row.entries if entry.finished and machine(entry) == on)
        value = mean_cost([entry.record for entry in timed], cost)
        if summary is not None and value is not None:
            scored = (row.cells[known] for known in ([column] if column else row.cells))
            runs = tuple(entry for cell in scored for entry in cell.finished)
            found.append(Place(row, summary.mean, value, runs, timed))
    return found


def _draw(grid: Grid, known: dict[tuple[str, str], tuple[list[Place], list[Place], Unit]]) -> Figure:
    figure = canvas(len(known) // len(FRONTS), len(FRONTS), 2.6)
    for number, ((quality, cost), (places, best, unit)) in enumerate(known.items(), start=1):
        axes = figure.add_subplot(len(known) // len(FRONTS), len(FRONTS), number)
        axes.plot([p.cost for p in best], [p.quality for p in best], color="#999999", linewidth=0.8, label="front")
        for place in places:
            drawn = point([row.method for row in grid.rows], place.row.method)
            axes.plot([place.cost], [place.quality], linestyle="", label=place.row.label, zorder=3, **drawn)
        axes.set_xlabel(FRONTS[cost])
        better = "lower" if unit.lower_is_better else "higher"
        axes.set_ylabel(f"{quality}\n({unit.words}, {better} is better)")
        grid_lines(axes)
    legend_below(figure, len(FRONTS))
    return figure


def fronts(grid: Grid, name: str) -> tuple[Section | None, dict[str, Figure]]:
    """Table and picture of quality against memory and time on the machine with most runs; nothing for one method."""
    on = main_machine(grid)
    if on is None or any(row.rate is not None for row in grid.rows):
        return None, {}
    known: dict[tuple[str, str], tuple[list[Place], list[Place], Unit]] = {}
    body = []
    for quality, (column, unit) in _qualities(grid).items():
        each = {cost: _places(grid, column, cost, on) for cost in FRONTS}
        if min(map(len, each.values())) < 2:
            continue
        best = {cost: front(places, unit.lower_is_better) for cost, places in each.items()}
        known |= {(quality, cost): (each[cost], best[cost], unit) for cost in FRONTS}
        rows = {place.row.label: place for places in each.values() for place in places}
        for label, place in rows.items():
            on_front = ["yes" if label in [p.row.label for p in best[cost]] else "no" for cost in FRONTS]
            costs_of = [next((f"{p.cost:,.1f}" for p in each[c] if p.row.label == label), "—") for c in FRONTS]
            texts = [text for pair in zip(costs_of, on_front, strict=True) for text in pair]
            mean = Traced(unit.text(place.quality), place.scored)
            body.append([label, quality, mean, *traced(texts, place.timed)])
    if not known:
        return None, {}
    with style():
        figure = _draw(grid, known)
    memory, time = FRONTS.values()
    header = ["method", "quality", "mean", memory, "on the memory front", time, "on the time front"]
    legend = f"Costs on one machine ({on}), quality of all runs; means alone, so neighbours may change places."
    picture = f"{name}-cost"
    return Section("fronts", "Quality against memory and time", header, body, 2, legend, (), (picture,)), {
        picture: figure
    }
