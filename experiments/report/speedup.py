"""How many times fewer steps, tokens and seconds a method needs to reach LoRA's final held-out loss."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.report.comparison import BASE, base_row
from experiments.report.figures import SECONDS, STEPS, TOKENS, held_out_loss, spent
from experiments.report.flags import machine
from experiments.report.grid import Cell, Grid
from experiments.report.loading import Entry
from experiments.report.sections import Section
from experiments.report.traced import traced

AXES = {"steps": STEPS, "tokens": TOKENS, "seconds": SECONDS}


def reached(entry: Entry, target: float) -> int | None:
    """The first step after which the held-out loss was measured at or below the target; None if it never was."""
    curve = held_out_loss(entry.record)
    return min((step for step, loss in curve.items() if step > 0 and loss <= target), default=None)


def ratio(mine: Entry, base: Entry, axis: str) -> float | None:
    """What LoRA spent on its whole run over what this run spent until it was as good; None if it never was."""
    curve = held_out_loss(base.record)
    step = reached(mine, curve[max(curve)])
    if step is None:
        return None
    return spent(base.record, axis)[max(curve)] / spent(mine.record, axis)[step]


def _pairs(cell: Cell, base: Cell) -> list[tuple[Entry, Entry]]:
    """Runs of one seed whose held-out loss was measured on the way at the same rows."""
    if cell.repeated_seeds or base.repeated_seeds:
        return []
    by_seed = {entry.record.seed: entry for entry in base.finished if held_out_loss(entry.record)}
    found = [(entry, by_seed.get(entry.record.seed)) for entry in cell.finished if held_out_loss(entry.record)]
    return [(entry, other) for entry, other in found if other is not None]


def _comparable(pair: tuple[Entry, Entry], axis: str) -> bool:
    mine, base = pair
    if axis == SECONDS and machine(mine) != machine(base):
        return False
    known = [spent(entry.record, axis) for entry in pair]
    return all(set(held_out_loss(entry.record)) <= set(place) for entry, place in zip(pair, known, strict=True))


def speedup_text(ratios: Sequence[float | None]) -> str:
    """Mean over the seeds that reached the target, and how many did."""
    known = [value for value in ratios if value is not None]
    if not ratios:
        return "not comparable"
    if not known:
        return f"not reached (0 of {len(ratios)})"
    return f"{np.mean(known):.2f} x ({len(known)} of {len(ratios)})"


def _intervals(pairs: Mapping[str, Sequence[tuple[Entry, Entry]]]) -> str:
    steps = {
        later - earlier
        for each in pairs.values()
        for pair in each
        for entry in pair
        for earlier, later in itertools.pairwise(sorted(held_out_loss(entry.record)))
    }
    return ", ".join(map(str, sorted(steps)))


def speedup(grid: Grid) -> Section | None:
    """The table; None where LoRA's held-out loss was not measured on the way, or nothing stands beside it."""
    base, body, used = base_row(grid), [], {}
    for task in grid.tasks if base is not None else ():
        for row in grid.rows:
            if base is None or row is base:
                continue
            pairs = _pairs(row.tasks[task], base.tasks[task])
            if pairs:
                used[f"{row.label} {task}"] = pairs
                ratios = [[ratio(*pair, axis) for pair in pairs if _comparable(pair, axis)] for axis in AXES.values()]
                runs = [entry for pair in pairs for entry in pair]
                body.append([row.label, task, *traced(map(speedup_text, ratios), runs)])
    if not body:
        return None
    header = ["method", "task", *(f"fewer {words}" for words in AXES)]
    legend = (
        f"What {BASE} spent on its whole run over what a method spent until its held-out loss was at or below {BASE}'s "
        "final one, seed by seed, then the mean over the seeds that got there (how many of how many); seconds count "
        f"the initialisation and only runs on one machine. The loss was measured every {_intervals(used)} steps, so no "
        "number is finer than that, and a method that gets there between two measurements is counted at the second."
    )
    return Section("speed-up", f"Speed-up to {BASE}'s final held-out loss", header, body, 2, legend)
