"""The learning-rate search behind a table: grid, budget, choice, and what is left of an advantage over tuned LoRA.

A search scores validation rows; a record scored on anything else decides nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.report.columns import LOSSES, unit
from experiments.report.comparison import BASE
from experiments.report.grid import METHODS, Grid, in_order, rate_text
from experiments.report.loading import Entry, Plan
from experiments.report.sections import Section
from experiments.report.traced import Traced

VALIDATION = "validation"


@dataclass(frozen=True)
class Search:
    """The finished runs of one method on one task's validation rows, by learning rate."""

    task: str
    method: str
    runs: Mapping[float, tuple[Entry, ...]]

    def mean(self, metric: str, rate: float) -> float | None:
        """Mean over the seeds of a rate, in the metric's unit; None where no run has the metric."""
        values = [value for entry in self.runs.get(rate, ()) if (value := entry.shown(metric)) is not None]
        return float(np.mean(values)) if values else None

    @property
    def loss(self) -> str:
        """The loss that decides."""
        return next(name for name in LOSSES if any(self.mean(name, rate) is not None for rate in self.runs))

    @property
    def best(self) -> float:
        """The rate of the lowest mean loss; the lower rate where two tie."""
        known = {rate: value for rate in self.runs if (value := self.mean(self.loss, rate)) is not None}
        return min(known, key=lambda rate: (known[rate], rate))

    @property
    def edge(self) -> str | None:
        """Whether the best rate is the highest or lowest tried, so that a better one may lie beyond."""
        if len(self.runs) < 2:
            return "only" if self.runs else None
        return {max(self.runs): "highest", min(self.runs): "lowest"}.get(self.best)


def on_validation(entry: Entry) -> bool:
    return (entry.record.data.get("scored") or {}).get("split") == VALIDATION


def searches(entries: Sequence[Entry]) -> list[Search]:
    """A search for each task and method with a finished run on validation rows, in the order of the tables."""
    usable = [entry for entry in entries if entry.finished and on_validation(entry)]
    usable = [entry for entry in usable if any(entry.shown(name) is not None for name in LOSSES)]
    found = []
    for task in in_order((entry.record.task for entry in usable), ()):
        for method in in_order((e.record.method for e in usable if e.record.task == task), METHODS):
            mine = [entry for entry in usable if (entry.record.task, entry.record.method) == (task, method)]
            rates = sorted({entry.record.learning_rate for entry in mine})
            by_rate = {rate: tuple(e for e in mine if e.record.learning_rate == rate) for rate in rates}
            found.append(Search(task, method, by_rate))
    return found


def _numbers(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _of(searches: Sequence[Search], name: str, entries: Sequence[Entry], plan: Plan) -> str:
    """Rows, grid and budget of the searches of one task."""
    task = searches[0].task
    rows = in_order((str(e.record.data["scored"]["n"]) for s in searches for runs in s.runs.values() for e in runs), ())
    tried = sorted({rate for search in searches for rate in search.runs})
    planned = sorted({rate for rates in plan.rates.values() for rate in rates}) or tried
    seeds = _numbers([len({e.record.seed for e in runs}) for search in searches for runs in search.runs.values()])
    budget = [sum(e.record.task == task and e.record.method == search.method for e in entries) for search in searches]
    rest = f", of {len(planned)} planned" if min(len(search.runs) for search in searches) < len(planned) else ""
    return (
        f"Learning rates: lowest mean loss on the {', '.join(rows)} validation rows of {task} (experiment={name}), "
        f"seeds a rate: {seeds}; one grid for every method: {', '.join(map(rate_text, planned))}; runs a method: "
        f"{_numbers(budget)}{rest}."
    )


def footnotes(found: Sequence[Search], name: str, entries: Sequence[Entry], plan: Plan, grid: Grid) -> list[str]:
    """Grid, budget and chosen value; and where the table took another value than the search's."""
    notes = []
    for task in dict.fromkeys(search.task for search in found):
        mine = [search for search in found if search.task == task]
        chosen = ", ".join(f"{search.method} {rate_text(search.best)}" for search in mine)
        notes.append(f"{_of(mine, name, entries, plan)} Chosen: {chosen}.")
        edges = [f"{search.method} ({search.edge} tried)" for search in mine if search.edge]
        if edges:
            notes.append(f"At the edge of what was tried, so a better rate may lie beyond: {', '.join(edges)}.")
        best = {search.method: search.best for search in mine}
        used = {(row.method, rate) for row in grid.rows for cell in row.cells.values() for rate in cell.rates}
        other = [f"{method} {rate_text(rate)}" for method, rate in sorted(used) if best.get(method, rate) != rate]
        if other:
            notes.append(f"Not the rate that the search on {task} chose: {', '.join(other)}.")
    return notes


@dataclass(frozen=True)
class Shrinkage:
    """A method's advantage over LoRA in one metric, positive where the method is better.

    `shared`: LoRA at the method's own best rate (None: not run there); `tuned`: LoRA at its own.
    """

    method: str
    metric: str
    rate: float
    base_rate: float
    value: float
    base_shared: float | None
    base_tuned: float
    runs: tuple[Entry, ...]
    base_runs_shared: tuple[Entry, ...]
    base_runs_tuned: tuple[Entry, ...]

    @property
    def sign(self) -> int:
        return -1 if unit(self.metric).lower_is_better else 1

    @property
    def shared(self) -> float | None:
        return None if self.base_shared is None else self.sign * (self.value - self.base_shared)

    @property
    def tuned(self) -> float:
        return self.sign * (self.value - self.base_tuned)

    @property
    def sentence(self) -> str:
        """What the table's line says, in words."""
        known, start = unit(self.metric), f"{self.method}, {self.metric}"
        if self.shared is None:
            left = known.signed(self.tuned)
            return f"{start}: {left} with each at its own rate; LoRA was not run at {rate_text(self.rate)}."
        if self.rate == self.base_rate:
            return f"{start}: {known.signed(self.tuned)} over LoRA at {rate_text(self.rate)}, the best rate of both."
        text = (
            f"{start}: {known.signed(self.shared)} over LoRA at the shared rate {rate_text(self.rate)}, "
            f"{known.signed(self.tuned)} over LoRA at its own {rate_text(self.base_rate)}"
        )
        if self.shared <= 0:
            return f"{text}; there was no advantage to shrink."
        if self.tuned <= 0:
            return f"{text}: none of the advantage is left."
        if self.tuned > self.shared:
            return f"{text}: the advantage does not shrink."
        return f"{text}: {100 * self.tuned / self.shared:.0f} % of the advantage is left."


def shrinkages(found: Sequence[Search]) -> list[Shrinkage]:
    """Every method's advantage over LoRA of the same task, in the deciding loss and in the task's own metrics."""
    result = []
    for search in found:
        base = next((s for s in found if (s.task, s.method) == (search.task, BASE)), None)
        if base is None or search is base:
            continue
        shown = [name for runs in search.runs.values() for entry in runs for name in entry.metrics]
        for metric in dict.fromkeys([search.loss, *shown]):
            value, tuned = search.mean(metric, search.best), base.mean(metric, base.best)
            if value is not None and tuned is not None:
                shared = base.mean(metric, search.best)
                numbers = (search.best, base.best, value, shared, tuned)
                behind = (search.runs[search.best], base.runs.get(search.best, ()), base.runs[base.best])
                result.append(Shrinkage(search.method, metric, *numbers, *behind))
    return result


def shrinkage(found: Sequence[Search], name: str) -> Section | None:
    """How far each method's advantage shrinks when LoRA's rate is tuned on the same grid; None without both."""
    lines = shrinkages(found)
    if not lines:
        return None
    body = []
    for line in lines:
        known = unit(line.metric)
        there = "not run" if line.base_shared is None else known.text(line.base_shared)
        shared = "—" if line.shared is None else known.signed(line.shared)
        cells = (
            (rate_text(line.rate), line.runs),
            (rate_text(line.base_rate), line.base_runs_tuned),
            (known.text(line.value), line.runs),
            (there, line.base_runs_shared),
            (shared, (*line.runs, *line.base_runs_shared)),
            (known.text(line.base_tuned), line.base_runs_tuned),
            (known.signed(line.tuned), (*line.runs, *line.base_runs_tuned)),
        )
        body.append([line.method, line.metric, *(Traced(text, runs) for text, runs in cells)])
    header = ["method", "metric", "its rate", "LoRA's rate", "method", "LoRA at the method's rate", "advantage"]
    header += ["LoRA at its own rate", "advantage left"]
    seeds = _numbers([len(runs) for search in found for runs in search.runs.values()])
    legend = (
        f"On validation rows, from the records of experiment={name}, seeds a rate: {seeds}. Rates are chosen by the "
        "loss; an advantage is positive where the method is better than LoRA, whatever the metric's direction."
    )
    title = "The advantage over LoRA when LoRA's learning rate is tuned too"
    notes = [line.sentence for line in lines]
    return Section("tuned-advantage", title, header, body, 2, legend, notes)
