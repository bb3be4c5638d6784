"""Where the runs on the cluster stand: `python -m slurm.status experiment=glue [scale=local] [outputs=outputs]`.

Reads the records, what the tasks left in the submissions' folders, and squeue once; waits for nothing.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.config import ROOT, one_line_errors
from lora_ga.errors import SetupError
from lora_ga.records import RunRecord, read_record
from slurm.manifest import Entry, Exit, Submission, log_path, read_exit, read_manifest, submissions
from slurm.queue import Job, jobs

STATES = ("done", "running", "pending", "requeued", "failed", "diverged")
SILENT = "ended without a word: killed, out of memory, or its node failed"


@dataclass(frozen=True)
class Row:
    """One run of the table."""

    state: str
    label: str
    job: str
    requeues: int
    reason: str
    log: Path


def _record(entry: Entry) -> RunRecord | None:
    try:
        return read_record(Path(entry.record))
    except ValueError:
        return None


def judge(record: RunRecord | None, job: Job | None, end: Exit | None) -> tuple[str, str]:
    """(state, reason) of a run. A record of success is final; a failed one may be that of an earlier submission."""
    if record and record.status in ("finished", "diverged"):
        return ("done", "") if record.status == "finished" else ("diverged", record.error or "")
    if job and job.at_work:
        if job.state != "PENDING":
            return "running", "" if job.state == "RUNNING" else job.state.lower()
        return ("requeued", f"{end.reason} {job.reason}".strip()) if end else ("pending", job.reason)
    if job and job.state not in ("COMPLETED", "FAILED"):
        return "failed", f"{job.state.lower()} {'' if job.reason == 'None' else job.reason}".strip()
    if end is None or end.outcome in ("running", "requeued"):
        return "failed", SILENT
    if end.reason == "exit code 1" and record and record.error:
        return "failed", record.error
    return "failed", f"{end.outcome}: {end.reason}" if end.outcome == "cancelled" else end.reason


def row(submission: Submission, entry: Entry, queue: Mapping[tuple[str, str], Job]) -> Row:
    """What is known of one run."""
    job, end = submission.job_of(entry), read_exit(submission.folder, entry.index)
    state, reason = judge(_record(entry), queue.get((job, submission.name)), end)
    place = log_path(submission.folder, entry.index)
    place = place.relative_to(ROOT) if place.is_relative_to(ROOT) else place
    return Row(state, entry.label, job, end.attempt if end else 0, " ".join(reason.split()), place)


def table(parent: Path) -> list[Row]:
    """Every run that was ever sent, in the order of sending, as its latest submission knows it."""
    queue = jobs()
    latest = {entry.record: (sent, entry) for sent in submissions(parent) for entry in read_manifest(sent.folder)}
    return [row(sent, entry, queue) for sent, entry in latest.values()]


def _place(arguments: Sequence[str]) -> Path:
    """The folder of the experiment's submissions."""
    values = {"scale": "local", "outputs": "outputs"}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in ("experiment", "scale", "outputs") or not value:
            raise SetupError(f"{argument!r} is not one of experiment=.., scale=.., outputs=..")
        values[key] = value
    if not re.fullmatch(r"[\w.-]+", values.get("experiment", "")):
        raise SetupError("say which experiment, e.g. experiment=glue")
    parent = ROOT / values["outputs"] / "slurm" / f"{values['experiment']}-{values['scale']}"
    if not submissions(parent):
        raise SetupError(f"nothing was sent from {parent}: python -m slurm.submit experiment=.. sends")
    return parent


def main(arguments: Sequence[str]) -> int:
    """Command line: one line a run, then the counts."""
    with one_line_errors():
        rows = table(_place(arguments))
        width = max(len(row.label) for row in rows)
        print(f"{'state':<10}{'run':<{width}}  {'job':<12}{'requeues':>8}  log  reason")
        for row in rows:
            line = f"{row.state:<10}{row.label:<{width}}  {row.job:<12}{row.requeues:>8}  {row.log}  {row.reason}"
            print(line.rstrip())
        counts = Counter(row.state for row in rows)
        print(f"{len(rows)} runs: " + ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
