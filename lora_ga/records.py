"""The record: the one JSON file a run leaves, source of truth for every table and plot."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ga.errors import SetupError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "hydra-core", "numpy")

# Keys of `train` that came after the first records, with what was the case before.
LATER = {"alignment_every": None, "compile": False}
LATER_GRADIENT = {
    "rows_at_once": None,
    "mode": "exact",
    "device": "cpu",
    "dtype": "float32",
    "power_iterations": 1,
    "passes": 2,
}

RUN_COLUMNS = (
    "experiment",
    "scale",
    "task",
    "protocol",
    "method",
    "model",
    "seed",
    "learning_rate",
    "status",
    "run_id",
)


@dataclass
class RunRecord:
    """What one run was, on what, and what came out of it.

    `status` is "finished", "failed" (see `error`) or "diverged" (a loss was not finite).
    `metrics` maps a name to {"value": float, "n": rows it was computed on}.
    `loss_curve` rows hold step, loss (mean per target token), learning_rate, grad_norm, tokens and seconds so far, and
    held_out_loss at the steps where it was measured; its value before the first step is in `step0`. Steps measured
    against their full gradient have alignment and captured (lora_ga/alignment.py).
    `cost` holds seconds (init, train, eval, total), peak_memory_mb (until the training's end), trainable_parameters,
    optimizer_state_mb, classified_rows_per_second, and generated_tokens_per_second where answers were made.
    """

    run_id: str
    experiment: str
    scale: str
    model: str
    task: str
    protocol: str
    protocol_hash: str
    method: str
    seed: int
    learning_rate: float
    config: dict[str, Any]
    environment: dict[str, Any]
    status: str = "failed"
    error: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    step0: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, Any] = field(default_factory=dict)
    loss_curve: list[dict[str, float]] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    started_at: str = ""
    finished_at: str = ""
    schema_version: int = SCHEMA_VERSION


def record_name(task: str, method: str, seed: int, run_id: str) -> str:
    """Name of a run's record file: readable, and unique to what was run."""
    return f"{task}-{method}-seed{seed}-{run_id}.json"


def content_hash(value: Any, length: int = 12) -> str:
    """Hex sha256 of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def as_first(train: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's `train` without the keys that the first records lack, where they say what was the case then.

    So runs that are the same have the same hash, whenever they were recorded.
    """

    def but(values: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in usual or value != usual[key]}

    gradient = {"gradient": but(train["gradient"], LATER_GRADIENT)} if "gradient" in train else {}
    return {**but(train, LATER), **gradient}


def write_atomic(path: Path, text: str) -> Path:
    """Write text so that a reader, or a crash at any moment, sees the old file or the new one and never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)
    return path


def write_record(record: RunRecord, path: Path) -> Path:
    """Write the record atomically; a number that is not finite is refused (ValueError), as JSON has none."""
    return write_atomic(path, json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False) + "\n")


def read_record(path: Path) -> RunRecord:
    """Read one record; a damaged, foreign or older-schema file raises ValueError naming the path."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema version {raw.get('schema_version')}, this code reads {SCHEMA_VERSION}")
        return RunRecord(**raw)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a run record ({error})") from error


def load_runs(folder: Path | str) -> pd.DataFrame:
    """Every record under `folder`, one row a run, for notebooks.

    Columns: experiment, scale, task, protocol, method, model, seed, learning_rate, status, run_id, path; each metric by
    its name, each cost as cost/<name>; `curve`, a frame of the loss curve (step, loss, tokens, seconds, and
    held_out_loss where it was measured, with its value before training at step 0). A file that is no record is named in
    a warning and left out; SetupError if there is no record at all.
    """
    import pandas as pd

    rows = []
    for path in sorted(Path(folder).expanduser().rglob("*.json")):
        try:
            record = read_record(path)
        except ValueError as error:
            log.warning("%s", error)
            continue
        start = record.step0.get("held_out_loss")
        curve = [{"step": 0, "held_out_loss": start}, *record.loss_curve] if start is not None else record.loss_curve
        rows.append(
            {name: getattr(record, name) for name in RUN_COLUMNS}
            | {"path": str(path), "curve": pd.DataFrame(curve)}
            | {name: cell["value"] for name, cell in record.metrics.items()}
            | {f"cost/{name}": value for name, value in record.cost.items()}
        )
    if not rows:
        raise SetupError(f"{folder} holds no run record: run make reproduce-glue first, or name another folder")
    return pd.DataFrame(rows)


def git_state(root: Path) -> dict[str, Any]:
    """Commit of the checkout at `root`, None if there is none, and whether what it tracks was changed since.

    results/ does not count: nothing there decides a number, and what a run or the bench writes there would make the
    next one look changed.
    """

    def git(*arguments: str) -> str:
        answer = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return answer.stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return {"git_commit": git("rev-parse", "HEAD") or None, "git_dirty": bool(changes)}


def capture_environment() -> dict[str, Any]:
    """Versions, commit, dirty flag and hardware of this process."""
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        **git_state(Path(__file__).resolve().parents[1]),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
    }
