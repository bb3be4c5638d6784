"""Records arranged as the table shows them: a row for each method, a column for each task and metric.

Nothing is chosen silently: a method whose cells hold several learning rates, or several other settings, is split into
one row for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from experiments.report.columns import GRADE, PERCENT, Column
from experiments.report.loading import Entry, Plan
from experiments.report.statistics import Summary, at_random_level, summarise
from lora_ga.records import as_first, content_hash

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


def rank(entry: Entry) -> int | None:
    """The rank of a run's adapters; None for full fine-tuning."""
    value = (entry.record.config.get("method") or {}).get("r")
    return None if value is None else int(value)


def settings_hash(entry: Entry) -> str:
    """What a run was besides method, task, learning rate and seed; the same on every machine."""
    config = {**entry.record.config, "train": as_first(entry.record.config.get("train") or {})}
    left_out = {"model": {"source"}, "train": {"learning_rate", "alignment_every"}, "eval": {"batch_size"}}
    parts = {
        name: {key: value for key, value in (config.get(name) or {}).items() if key not in left_out.get(name, set())}
        for name in ("model", "method", "train", "eval")
    }
    return content_hash({**parts, "protocol": entry.record.protocol}, 6)


@dataclass(frozen=True)
class Cell:
    """The runs of one row on one task, and one metric of theirs."""

    column: Column
    entries: tuple[Entry, ...]

    @property
    def task(self) -> str:
        return self.column.task

    @cached_property
    def finished(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.finished)

    @property
    def repeated_seeds(self) -> bool:
        """Whether a seed is there twice: then no number of this cell could be trusted."""
        seeds = [entry.record.seed for entry in self.entries]
        return len(seeds) != len(set(seeds))

    @cached_property
    def by_seed(self) -> dict[int, float]:
        """The metric, in the column's unit, of the finished runs that have it."""
        values = {entry.record.seed: entry.shown(self.column.metric) for entry in self.finished}
        return {seed: value for seed, value in values.items() if value is not None}

    @cached_property
    def summary(self) -> Summary | None:
        """Of the metric over the seeds that have it."""
        return None if self.repeated_seeds else summarise(list(self.by_seed.values()))

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
        return sum(_at_random_level(entry) for entry in self.finished) if self.column.unit is PERCENT else 0

    @property
    def untrusted(self) -> bool:
        """Whether some of these are the grades of a judge that the record does not say to trust."""
        graded = self.by_seed and self.column.unit is GRADE
        return bool(graded) and not all(entry.judge.get("trusted") for entry in self.finished)


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
    columns: tuple[Column, ...]
    runs: Mapping[str, tuple[Entry, ...]]
    rank: int | None = None  # where it is what tells the settings apart

    @property
    def label(self) -> str:
        parts = [f"lr {rate_text(self.rate)}"] if self.rate is not None else []
        if self.settings:
            parts.append(f"rank {self.rank}" if self.rank is not None else f"settings {self.settings}")
        return f"{self.method} ({', '.join(parts)})" if parts else self.method

    @property
    def entries(self) -> list[Entry]:
        return [entry for runs in self.runs.values() for entry in runs]

    def cell(self, task: str, metric: str) -> Cell:
        """Any metric of the runs on a task, a column of the table or not."""
        return Cell(Column(task, metric), self.runs.get(task, ()))

    @cached_property
    def cells(self) -> dict[Column, Cell]:
        return {column: Cell(column, self.runs[column.task]) for column in self.columns}

    @cached_property
    def tasks(self) -> dict[str, Cell]:
        """For each task the cell of its first, the headline, metric."""
        first: dict[str, Cell] = {}
        for cell in self.cells.values():
            first.setdefault(cell.task, cell)
        return first

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
    """All rows over the same columns."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column.task for column in self.columns))

    @property
    def entries(self) -> list[Entry]:
        return [entry for row in self.rows for entry in row.entries]

    @property
    def averaged(self) -> bool:
        """Whether every task has one metric and all are shares: only these have a meaningful average."""
        return len(self.columns) == len(self.tasks) and all(column.unit is PERCENT for column in self.columns)

    def heading(self, column: Column) -> str:
        """The task, or its metric where a task has several."""
        if self.averaged:
            return column.task
        return column.words if len(self.tasks) == 1 else f"{column.task}: {column.words}"


def _rows_of(
    method: str, entries: Sequence[Entry], columns: tuple[Column, ...], planned: Sequence[float]
) -> Iterable[Row]:
    tasks = list(dict.fromkeys(column.task for column in columns))

    def row(rate: float | None, kind: str | None) -> Row:
        chosen = [
            entry
            for entry in entries
            if rate in (None, entry.record.learning_rate) and (kind is None or settings_hash(entry) == kind)
        ]
        runs = {task: tuple(entry for entry in chosen if entry.record.task == task) for task in tasks}
        kinds = {(settings_hash(entry), rank(entry)) for entry in entries if rate in (None, entry.record.learning_rate)}
        ranks = [known for _, known in kinds]
        own = [known for other, known in kinds if other == kind]
        return Row(method, rate, kind, columns, runs, own[0] if own and len(set(ranks)) == len(ranks) else None)

    rates: list[float] = sorted({*planned, *(entry.record.learning_rate for entry in entries)})
    several = len(planned) > 1 or any(len(cell.rates) > 1 for cell in row(None, None).tasks.values())
    for rate in rates if several else [None]:
        whole = row(rate, None)
        if any(len(cell.settings) > 1 for cell in whole.tasks.values()):
            kinds = {(rank(entry) or 0, settings_hash(entry)) for entry in whole.entries}
            yield from (row(rate, kind) for _, kind in sorted(kinds))
        else:
            yield whole


def build_grid(
    entries: Sequence[Entry], plan: Plan, scale: str, methods: Iterable[str] = (), columns: Iterable[Column] = ()
) -> Grid:
    """A row for every method recorded, planned or in `methods`.

    A column for every metric of every task recorded or, if it is not, planned; and those of `columns` on these tasks.
    """
    ordered = sorted(entries, key=lambda entry: (entry.record.seed, entry.file))
    tasks = in_order([*plan.tasks, *(entry.record.task for entry in entries)], TASKS[scale])
    recorded = [Column(entry.record.task, metric) for entry in ordered for metric in entry.metrics]
    known = {column.task for column in recorded}
    planned = [Column(task, name) for task in tasks if task not in known for name in plan.tasks[task] or ("",)]
    unsorted = dict.fromkeys([*recorded, *planned, *(column for column in columns if column.task in tasks)])
    shown = tuple(sorted(unsorted, key=lambda column: tasks.index(column.task)))  # stable: metrics stay in their order
    rows: list[Row] = []
    for method in in_order([*plan.rates, *methods, *(entry.record.method for entry in entries)], METHODS):
        mine = [entry for entry in ordered if entry.record.method == method]
        rows += _rows_of(method, mine, shown, plan.rates.get(method, ()))
    return Grid(shown, tuple(rows))
