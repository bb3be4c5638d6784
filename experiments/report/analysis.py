"""What stands below the main table: comparisons, tuning, convergence, cost, each as a table with its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from experiments.report.alignment import alignment
from experiments.report.comparison import against_lora, over_tasks
from experiments.report.costs import costs, fronts
from experiments.report.figures import loss_figures
from experiments.report.grid import Grid
from experiments.report.loading import Entry, Plan
from experiments.report.page import convergence
from experiments.report.sections import Section
from experiments.report.sensitivity import RANK, RATE, sensitivity
from experiments.report.speedup import speedup
from experiments.report.tuning import footnotes, searches, shrinkage


@dataclass(frozen=True)
class SearchRecords:
    """The records of the search that chose a table's learning rates, the files left out, and what was planned."""

    name: str
    entries: Sequence[Entry]
    skipped: Sequence[str]
    plan: Plan


@dataclass(frozen=True)
class Analysis:
    """The sections in their order, their pictures by name, and what belongs under the main table."""

    sections: list[Section]
    figures: dict[str, Figure]
    notes: list[str]


def analyse(grid: Grid, name: str, search: SearchRecords | None) -> Analysis:
    """Everything that the records of a table, and of the search behind it, can tell."""
    notes: list[str] = []
    tuned = None
    if search is not None:
        found = searches(search.entries)
        notes += footnotes(found, search.name, search.entries, search.plan, grid)
        tuned = shrinkage(found, search.name)
        if search.skipped:
            notes.append(f"Left out, not readable as records of experiment={search.name}: {', '.join(search.skipped)}.")
    by_task, figures = loss_figures(grid, name)
    rates, rate_figure = sensitivity(grid, name, RATE)
    ranks, rank_figure = sensitivity(grid, name, RANK)
    steps, step_figures = alignment(grid, name)
    front, front_figure = fronts(grid, name)
    curves = [picture for picture in figures if picture not in by_task.values()]
    sections = [
        over_tasks(grid),
        against_lora(grid),
        tuned,
        rates,
        ranks,
        convergence(grid, [*by_task.values(), *curves]),
        speedup(grid),
        steps,
        costs(grid),
        front,
    ]
    pictures = {**figures, **rate_figure, **rank_figure, **step_figures, **front_figure}
    return Analysis([section for section in sections if section is not None], pictures, notes)
