"""The folder of one submission: <outputs>/slurm/<experiment>-<scale>/<time>/.

manifest.jsonl (one run a line), submission.json (commit, settings), job.json (SLURM's id, once it is sent), configs/
(resolved), code/ (what runs), logs/ and exits/ (how each task last ended), by the index of the run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ga.records import write_atomic


@dataclass(frozen=True)
class Entry:
    """One run of a submission; `record` is where its record will be."""

    index: int
    label: str
    run_id: str
    record: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Exit:
    """How far a task has come; `attempt` counts its requeues."""

    outcome: str  # running, requeued, finished, failed or cancelled
    reason: str
    attempt: int
    node: str


@dataclass(frozen=True)
class Submission:
    """A folder that was handed to SLURM."""

    folder: Path
    job: str
    name: str
    array: bool

    def job_of(self, entry: Entry) -> str:
        """SLURM's id of the entry's task."""
        return f"{self.job}_{entry.index}" if self.array else self.job


def write_manifest(folder: Path, entries: Sequence[Entry]) -> None:
    """Write the manifest, one JSON object a line."""
    lines = [json.dumps(dataclasses.asdict(entry)) + "\n" for entry in entries]
    write_atomic(folder / "manifest.jsonl", "".join(lines))


def read_manifest(folder: Path) -> list[Entry]:
    """The runs of a submission, by index."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return [Entry(**{**row, "overrides": tuple(row["overrides"])}) for row in rows]


def log_path(folder: Path, index: int | str) -> Path:
    """Where a task's output goes, all its attempts one after another."""
    return folder / "logs" / f"{index}.log"


def write_exit(folder: Path, index: int, end: Exit) -> None:
    """Say how far a task has come."""
    write_atomic(folder / "exits" / f"{index}.json", json.dumps(dataclasses.asdict(end)) + "\n")


def read_exit(folder: Path, index: int) -> Exit | None:
    """How far a task has come; None if it has not started."""
    path = folder / "exits" / f"{index}.json"
    return Exit(**json.loads(path.read_text())) if path.exists() else None


def write_job(submission: Submission) -> None:
    """Note what SLURM calls the submission."""
    said: dict[str, Any] = {"job": submission.job, "name": submission.name, "array": submission.array}
    write_atomic(submission.folder / "job.json", json.dumps(said) + "\n")


def submissions(parent: Path) -> list[Submission]:
    """What was handed to SLURM from one experiment's folder, oldest first."""
    sent = sorted(parent.glob("*/job.json"))
    return [Submission(folder=path.parent, **json.loads(path.read_text())) for path in sent]
