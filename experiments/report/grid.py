"""Records arranged as the table shows them: one row a method, one column a task, nothing chosen silently.

A method whose cells hold several learning rates, or several other settings, is split into one row for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from experiments.report.loading import Entry, Plan
from experiments.report.statistics import Summary, at_random_level, summarise
from lora_ga.records import content_hash

METHODS = (
    "full_ft",
    "lora",
    "rslora",
    "lora_plus",
    "dora",
    "pissa",
    "adalora",
    "lora_ga",
    "lora_one",
    "lora_pro",
)
TASKS = {
    "local": ("movies", "tone", "acceptability", "compare", "reply", "pairs"),
    "paper": ("mnli", "sst2", "cola", "qnli", "mrpc"),
}


def in_order(names: Iterable[str], first: Sequence[str]) -> list[str]:
    """`names` without repetition: those of `first` in its order, then the others by alphabet."""
    return sorted(set(names), key=lambda name: (first.index(name) if name in first else len(first), name))


def rate_text(rate: float) -> str:
    """0.001 -> "1e-3"."""
    mantissa, _, exponent = f"{rate:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def settings_hash(entry: Entry) -> str:
    """What a run was besides method, task, learning rate and seed; the same on every machine."""
    config = entry.record.config
    left_out = {"model": {"source"}, "train": {"learning_rate"}, "eval": {"batch_size"}}
    parts = {
        name: {key: value for key, value in (config.get(name) or {}).items() if key not in left_out.get(name, set())}
        for name in ("model", "method", "train", "eval")
    }
    return content_hash({**parts, "protocol": entry.record.protocol}, 6)


@dataclass(frozen=True)
class Cell:
    """The runs of one row on one task."""

    task: str
    entries: tuple[Entry, ...]

    @cached_property
    def finished(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.finished)

    @property
    def repeated_seeds(self) -> bool:
        """Whether a seed is there twice: then no number of this cell could be trusted."""
        seeds = [entry.record.seed for entry in self.entries]
        return len(seeds) != len(set(seeds))

    @cached_property
    def summary(self) -> Summary | None:
        """Of the headline metric in percent over the finished seeds."""
        return None if self.repeated_seeds else summarise([entry.percent for entry in self.finished])

    @property
    def by_seed(self) -> dict[int, float]:
        return {entry.record.seed: entry.percent for entry in self.finished}

    def count(self, status: str) -> int:
        return sum(entry.record.status == status for entry in self.entries)

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(sorted({entry.record.learning_rate for entry in self.entries}))

    @property
    def settings(self) -> frozenset[str]:
        return frozenset(map(settings_hash, self.entries))

    @property
    def random_level(self) -> int:
        """How many finished runs are no better than always answering the most frequent label."""
        return sum(_at_random_level(entry) for entry in self.finished)

    def mean_metric(self, name: str) -> float | None:
        """Mean over the finished seeds of another metric, None where a seed lacks it."""
        values = [entry.record.metrics.get(name, {}).get("value") for entry in self.finished]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None


def _at_random_level(entry: Entry) -> bool:
    majority, accuracy = entry.record.data.get("majority_rate"), entry.record.metrics.get("accuracy")
    if majority is None or accuracy is None:
        return False
    return at_random_level(accuracy["value"], majority, int(accuracy["n"]))


@dataclass(frozen=True)
class Row:
    """A method, narrowed to one learning rate or one set of settings where its cells hold several."""

    method: str
    rate: float | None
    settings: str | None
    cells: dict[str, Cell]

    @property
    def label(self) -> str:
        parts = [f"lr {rate_text(self.rate)}"] if self.rate is not None else []
        parts += [f"settings {self.settings}"] if self.settings else []
        return f"{self.method} ({', '.join(parts)})" if parts else self.method

    @property
    def entries(self) -> list[Entry]:
        return [entry for cell in self.cells.values() for entry in cell.entries]

    @cached_property
    def average(self) -> Summary | None:
        """Average over all tasks; a spread only where every task has the same seeds, each then averaged by itself."""
        summaries = [cell.summary for cell in self.cells.values()]
        if not summaries or any(summary is None for summary in summaries):
            return None
        by_seed = [cell.by_seed for cell in self.cells.values()]
        seeds = sorted(by_seed[0])
        if all(sorted(scores) == seeds for scores in by_seed):
            return summarise([sum(scores[seed] for scores in by_seed) / len(by_seed) for seed in seeds])
        mean = sum(summary.mean for summary in summaries if summary) / len(summaries)
        return Summary(mean, None, None, None, 0)


@dataclass(frozen=True)
class Grid:
    """All rows over the same tasks."""

    tasks: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def entries(self) -> list[Entry]:
        return [entry for row in self.rows for entry in row.entries]


def _several(entries: Sequence[Entry], tasks: Sequence[str], kind: str) -> bool:
    """Whether some cell holds more than one learning rate ("rates") or set of settings ("settings")."""
    cells = [Cell(task, tuple(entry for entry in entries if entry.record.task == task)) for task in tasks]
    return any(len(getattr(cell, kind)) > 1 for cell in cells)


def _rows_of(method: str, entries: Sequence[Entry], tasks: Sequence[str], planned: Sequence[float]) -> list[Row]:
    rates: list[float | None] = [None]
    if len(planned) > 1 or _several(entries, tasks, "rates"):
        rates = sorted({*planned, *(entry.record.learning_rate for entry in entries)})  # type: ignore[assignment]
    rows = []
    for rate in rates:
        mine = [entry for entry in entries if rate is None or entry.record.learning_rate == rate]
        kinds: list[str | None] = [None]
        if _several(mine, tasks, "settings"):
            kinds = sorted(set(map(settings_hash, mine)))  # type: ignore[assignment]
        for kind in kinds:
            chosen = [entry for entry in mine if kind is None or settings_hash(entry) == kind]
            cells = {task: Cell(task, tuple(e for e in chosen if e.record.task == task)) for task in tasks}
            rows.append(Row(method, rate, kind, cells))
    return rows


def build_grid(entries: Sequence[Entry], plan: Plan, scale: str, also: Iterable[str] = ()) -> Grid:
    """A row for every method with a record, in the plan or in `also`; a column for every task recorded or planned."""
    tasks = in_order([*plan.tasks, *(entry.record.task for entry in entries)], TASKS[scale])
    methods = in_order([*plan.rates, *also, *(entry.record.method for entry in entries)], METHODS)
    ordered = sorted(entries, key=lambda entry: (entry.record.seed, entry.file))
    rows = []
    for method in methods:
        mine = [entry for entry in ordered if entry.record.method == method]
        rows += _rows_of(method, mine, tasks, plan.rates.get(method, ()))
    return Grid(tuple(tasks), tuple(rows))
