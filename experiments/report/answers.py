"""What stands behind a benchmark's score: the three readings of an answer, misses, timeouts, the judge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiments.report.columns import GRADED, PERCENT, WORDS
from experiments.report.grid import Cell, Grid, Row, in_order
from experiments.report.loading import Entry
from experiments.report.sections import Section
from experiments.report.tables import summary_text
from experiments.report.traced import Traced

# Metrics beside the scores of eval/gsm8k.py, eval/humaneval.py and eval/mt_bench_scores.py; the last is a count.
EXTRACTORS = ("strict", "flexible", "authors")
PARSE_FAILURES, TIMED_OUT, UNPARSED = "parse_failures", "timed_out", GRADED + "unparsed_judgments"
MANY = 20.0  # percent of answers that cannot be read, from which a score says more of their form than of their sense


def _benchmarks(entries: Iterable[Entry], metric: str, task: str) -> list[str]:
    """Benchmarks of a task of which some run holds this metric, in the order of the runs' metrics."""
    names = (name for entry in entries if entry.record.task == task for name in entry.record.metrics)
    return list(dict.fromkeys(name.partition("/")[0] for name in names if name.endswith(f"/{metric}")))


def readings(grid: Grid) -> Section | None:
    """Word problems as each extractor reads the same answers; None if there are none."""
    body = []
    for task in grid.tasks:
        for benchmark in _benchmarks(grid.entries, EXTRACTORS[0], task):
            for row in grid.rows:
                cells = [row.cell(task, f"{benchmark}/{name}") for name in (*EXTRACTORS, PARSE_FAILURES)]
                if cells[0].summary is None:
                    continue
                counts = {entry.record.metrics[cells[0].column.metric]["n"] for entry in _with(cells[0])}
                rows = ", ".join(str(int(count)) for count in sorted(counts))
                texts = [summary_text(cell.summary) if cell.summary else "—" for cell in cells]
                each = [Traced(text, _with(cell)) for text, cell in zip(texts, cells, strict=True)]
                body.append([row.label, WORDS.get(benchmark, benchmark), *each, Traced(rows, _with(cells[0]))])
    if not body:
        return None
    header = ["method", "problems", "strict", "flexible", "as the authors' code", "strict finds no number", "rows"]
    legend = (
        "The same answers: strict takes the number after the last marker, flexible the last number, and the authors' "
        "code reads 1,080 as 1 and a miss as 0 (eval/gsm8k.py). In percent."
    )
    return Section("readings", "Answers read three ways", header, body, 2, legend)


def _with(cell: Cell) -> list[Entry]:
    return [entry for entry in cell.finished if cell.column.metric in entry.record.metrics]


def _highest(grid: Grid, metric: str, least: float) -> list[str]:
    """ "lora: seen 35.00 %" for every row whose worst seed reaches `least` percent."""
    found = []
    for row in grid.rows:
        texts = [
            f"{WORDS.get(benchmark, benchmark)} {PERCENT.text(worst)} %"
            for task in grid.tasks
            for benchmark in _benchmarks(row.entries, metric, task)
            if (worst := _worst(row, task, f"{benchmark}/{metric}")) >= least and worst > 0
        ]
        found += [f"{row.label}: {', '.join(texts)}"] if texts else []
    return found


def _worst(row: Row, task: str, metric: str) -> float:
    return max(row.cell(task, metric).by_seed.values(), default=0.0)


def _unparsed(grid: Grid) -> list[str]:
    found = []
    for row in grid.rows:
        counts = [entry.record.metrics[UNPARSED] for entry in row.entries if UNPARSED in entry.record.metrics]
        missing, of = (int(sum(count[key] for count in counts)) for key in ("value", "n"))
        found += [f"{row.label}: {missing} of {of}"] if missing else []
    return [f"Judgments without a rating, in no mean: {'; '.join(found)}."] if found else []


def _judges(grid: Grid) -> list[str]:
    cells = [cell for row in grid.rows for cell in row.cells.values() if cell.untrusted]
    used = [entry.judge for cell in cells for entry in _with(cell)]
    names = (str(judge.get("judge") or judge.get("name") or judge.get("model")) for judge in used)
    judges = in_order((name.rpartition("/")[2] for name in names), ())
    if not judges:
        return []
    return [
        f"§ Judge not trusted ({', '.join(judges)}): these grades only show that the path works; they are compared "
        "with no published score."
    ]


def answer_flags(grid: Grid) -> Sequence[str]:
    """What a reader must know before believing the score of a benchmark."""
    notes = []
    failures = _highest(grid, PARSE_FAILURES, MANY)
    if failures:
        notes.append(
            f"No number found in {MANY:g} % or more of the answers; highest share over seeds: {'; '.join(failures)}."
        )
    timeouts = _highest(grid, TIMED_OUT, 0.0)
    if timeouts:
        notes.append(
            f"Programs that ran out of time, scored as failed; highest share over seeds: {'; '.join(timeouts)}."
        )
    return [*notes, *_unparsed(grid), *_judges(grid)]
