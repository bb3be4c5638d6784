"""Builders of synthetic records, and the command line run on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from experiments.report.__main__ import main
from lora_ga.records import RunRecord, write_record

ENVIRONMENT = {
    "git_commit": "a" * 40,
    "git_dirty": False,
    "cpu": "AVX2",
    "cpu_count": 2,
    "torch_threads": 2,
    "gpu": None,
}


def make_record(task: str, method: str, seed: int, value: float | None, **changes: Any) -> RunRecord:
    """A finished run with headline metric `value`, or a failed one where it is None."""
    record = RunRecord(
        run_id=f"{task}{method}{seed}",
        experiment="toy",
        scale="local",
        model="tiny",
        task=task,
        protocol="common",
        protocol_hash="p",
        method=method,
        seed=seed,
        learning_rate=1e-3,
        config={"task": {"name": task, "metric": "accuracy"}, "method": {"name": method, "r": 8}},
        environment=dict(ENVIRONMENT),
        data={"train": {"n": 64}, "scored": {"split": "test", "n": 400, "of": 400}, "majority_rate": 0.5},
    )
    if value is None:
        record.error = "OSError: no such|file"
    else:
        record.status = "finished"
        record.metrics = {"accuracy": {"value": value, "n": 400}, "eval_loss": {"value": 1 - value, "n": 400}}
        record.cost = {
            "train_seconds": 10.0 + seed,
            "total_seconds": 20.0,
            "peak_memory_mb": 1000.0,
            "trainable_parameters": 1234567,
        }
    return dataclasses.replace(record, **changes)


def make_generative(method: str, seed: int, metrics: dict[str, float], **changes: Any) -> RunRecord:
    """A finished run of a task answered in words, scored on its own templates and on new ones."""
    name = changes.pop("task", "problems")
    task = {
        "name": name,
        "kind": "generation",
        "metric": "seen/exact_match",
        "also": ["new/exact_match", "held_out_loss"],
    }
    settings = {
        "config": {
            "task": task,
            "method": {"name": method},
            "eval": {"benchmarks": None},
            "protocol": {"name": "common"},
            "train": {"held_out_rows": 24},
        },
        "metrics": {name: {"value": value, "n": 50} for name, value in metrics.items()},
        "data": {"train": {"n": 64}, "scored": {"split": "test", "n": 20, "of": 20}},
    }
    return make_record(name, method, seed, 0.5, **(settings | changes))


class Bench:
    """A results folder of its own: put records in, run the report, read what it wrote."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, *records: RunRecord, baseline: bool = False) -> None:
        for record in records:
            name = f"{record.experiment}-{record.scale}"
            folder = self.root / "baseline" / name / "records" if baseline else self.root / "runs" / name
            write_record(
                record,
                folder
                / f"{record.task}-{record.method}-seed{record.seed}-{record.run_id}-{record.learning_rate:g}.json",
            )

    def run(self, experiment: str = "toy", scale: str = "local", out: str = "out") -> Path:
        """Run the command line; returns the output folder."""
        folders = [f"{key}={self.root / name}" for key, name in [("records", "runs"), ("baseline", "baseline")]]
        assert main([f"experiment={experiment}", f"scale={scale}", *folders, f"out={self.root / out}"]) == 0
        return self.root / out

    def page(self, experiment: str = "toy", scale: str = "local") -> str:
        return (self.run(experiment, scale) / "tables" / f"{experiment}-{scale}.md").read_text(encoding="utf-8")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def record() -> Any:
    """The builder `make_record`."""
    return make_record


@pytest.fixture
def generative() -> Any:
    """The builder `make_generative`."""
    return make_generative
