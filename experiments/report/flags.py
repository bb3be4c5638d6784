"""What a reader must know before believing a cell: every flag is one sentence of the notes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from experiments.report.answers import answer_flags
from experiments.report.grid import Grid, in_order, rate_text
from experiments.report.loading import Entry
from lora_ga.records import content_hash


def _places(pairs: Iterable[tuple[str, str]]) -> str:
    """("lora", "movies"), ("lora", "reply") -> "lora: movies, reply"."""
    places: dict[str, list[str]] = {}
    for label, task in pairs:
        places.setdefault(label, []).append(task)
    return "; ".join(f"{label}: {', '.join(tasks)}" for label, tasks in places.items())


def _single_seed(grid: Grid) -> list[str]:
    cells = [(row.label, cell) for row in grid.rows for cell in row.tasks.values() if cell.finished]
    cells = [(label, cell) for label, cell in cells if not cell.repeated_seeds]
    single = [(label, cell.task) for label, cell in cells if len(cell.finished) == 1]
    if not single:
        return []
    where = "every cell" if len(single) == len(cells) else _places(single)
    return [f"Single seed, so no spread is known and small differences mean nothing: {where}."]


def _random_level(grid: Grid) -> list[str]:
    found = [(row.label, cell) for row in grid.rows for cell in row.tasks.values() if cell.random_level]
    if not found:
        return []
    where = _places((label, f"{cell.task} ({cell.random_level} of {len(cell.finished)} runs)") for label, cell in found)
    return [
        "° Random level: at least one run scores no higher than the most frequent label's share plus one binomial "
        f"standard error. {where}."
    ]


def _lost_runs(grid: Grid) -> list[str]:
    notes = []
    for kind in ("failed", "diverged"):
        places = [
            (row.label, f"{entry.record.task} seed {entry.record.seed}")
            for row in grid.rows
            for entry in row.entries
            if entry.record.status == kind
        ]
        if places:
            plural = "run" if len(places) == 1 else "runs"
            notes.append(f"{len(places)} {plural} {kind}, in no mean: {_places(places)}.")
    return notes


def _ambiguous(grid: Grid) -> list[str]:
    return [
        f"Ambiguous: {row.label} on {cell.task} has a seed more than once, so no number is shown; keep one of "
        f"{', '.join(entry.file for entry in cell.entries)}."
        for row in grid.rows
        for cell in row.tasks.values()
        if cell.repeated_seeds
    ]


def _row_settings(grid: Grid) -> list[str]:
    notes = []
    for row in grid.rows:
        used = [cell for cell in row.tasks.values() if cell.entries]
        if len({cell.rates for cell in used}) > 1:
            each = ", ".join(f"{cell.task} {rate_text(cell.rates[0])}" for cell in used)
            notes.append(f"{row.label} has a learning rate for each task: {each}.")
        if len({cell.settings for cell in used}) > 1:
            notes.append(f"{row.label} was run with different settings on different tasks.")
    return notes


def _rows_hash(entry: Entry) -> str:
    """What a run saw and was scored on."""
    record = entry.record
    left_out = ("data_root", "metric", "also")
    task = {key: value for key, value in record.config["task"].items() if key not in left_out}
    prompts = (record.config.get("protocol") or {}).get("prompts") or {}
    splits = {name: (record.data.get(name) or {}).get("sha256") for name in ("train", "scored")}
    return content_hash([task, prompts.get(record.task), splits])


def _mixed_rows(grid: Grid) -> list[str]:
    notes = []
    for task in grid.tasks:
        finished = [entry for entry in grid.entries if entry.finished and entry.record.task == task]
        if len(set(map(_rows_hash, finished))) > 1:
            notes.append(
                f"Mixed data: the runs on {task} differ in rows, sizes or prompt; its column is no comparison."
            )
    return notes


def _mixed(grid: Grid) -> list[str]:
    kinds: Sequence[tuple[str, Callable[[Entry], str]]] = (
        ("models", lambda entry: entry.record.model),
        ("protocols", lambda entry: entry.record.protocol),
        ("commits", lambda entry: str(entry.record.environment.get("git_commit"))),
    )
    notes = []
    for name, value in kinds:
        values = in_order(map(value, grid.entries), ())
        if len(values) > 1:
            notes.append(f"Mixed {name}: {', '.join(values)}.")
    dirty = sum(bool(entry.record.environment.get("git_dirty")) for entry in grid.entries)
    if dirty:
        notes.append(f"Dirty tree: {dirty} of {len(grid.entries)} runs had changes that no commit holds.")
    if len(hardware(grid)) > 1:
        notes.append("Mixed hardware: costs are listed apart for each.")
    return notes


def machine(entry: Entry) -> str:
    """What a record was made on."""
    known = entry.record.environment
    gpu = f"GPU {known['gpu']}, " if known.get("gpu") else ""
    cores, threads = known.get("cpu_count", "?"), known.get("torch_threads", "?")
    return f"{gpu}CPU {known.get('cpu', '?')}, {cores} cores, {threads} torch threads"


def on_machine(entry: Entry, text: str) -> bool:
    return machine(entry) == text


def main_machine(grid: Grid) -> str | None:
    """The machine most finished runs were made on: seconds and bytes are compared on one machine only."""
    made = [machine(entry) for entry in grid.entries if entry.finished]
    return min(set(made), key=lambda text: (-made.count(text), text)) if made else None


def hardware(grid: Grid) -> list[str]:
    """The machines behind the records, each once."""
    return in_order(map(machine, grid.entries), ())


def flags(grid: Grid, skipped: Sequence[str]) -> list[str]:
    """All flags of a table, as sentences."""
    notes = [*_single_seed(grid), *_random_level(grid), *_lost_runs(grid), *_ambiguous(grid), *answer_flags(grid)]
    notes += [*_row_settings(grid), *_mixed_rows(grid), *_mixed(grid)]
    if skipped:
        notes.append(f"Left out, not readable as records of this table: {', '.join(skipped)}.")
    return notes
