"""Scores of class predictions through the `evaluate` library, from a local module: nothing is fetched.

`evaluate` copies a module into the Hugging Face cache before it imports it. That cache may be read-only, shared over
a network file system, or hold a half-written copy, so each process has a folder of its own that goes when it ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import evaluate

if TYPE_CHECKING:  # scores alone need neither torch nor a model
    from eval.glue import Classification

METRICS = Path(__file__).resolve().parent / "metrics"


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="metrics-")  # removed when the process ends


@contextmanager
def _own_module_folder() -> Iterator[str]:
    """Within, `evaluate` copies modules to this process's folder, which it yields."""
    folder = _scratch().name
    before = evaluate.config.HF_MODULES_CACHE
    evaluate.config.HF_MODULES_CACHE = Path(folder)
    try:
        yield folder
    finally:
        evaluate.config.HF_MODULES_CACHE = before


@cache
def load_metric(name: str) -> Any:
    """The local module `eval/metrics/<name>.py` as an `evaluate.Metric`, loaded once a process, offline."""
    with _own_module_folder() as folder:
        return evaluate.load(str(METRICS / f"{name}.py"), keep_in_memory=True, cache_dir=folder)


def score(predictions: Sequence[int], references: Sequence[int], num_labels: int) -> dict[str, float]:
    """Accuracy, Matthews correlation and F1 (of class 1 for two classes, macro for more) of class numbers.

    Raises ValueError if there is nothing to score or the lengths differ.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"cannot score {len(predictions)} predictions against {len(references)} references")
    return load_metric("classification").compute(
        predictions=list(predictions), references=list(references), num_labels=num_labels
    )


def classification_metrics(
    classification: Classification, gold: Sequence[int], num_labels: int
) -> dict[str, dict[str, float]]:
    """A record's metrics of one classified data set: each {"value", "n"}, n the number of rows.

    exact_match is the share of rows whose greedy text is the gold label; eval_loss is the mean per gold token.
    """
    values = {
        **score(classification.predictions, gold, num_labels),
        "exact_match": sum(classification.exact) / len(classification.exact),
        "eval_loss": classification.gold_loss,
    }
    return {name: {"value": value, "n": len(gold)} for name, value in values.items()}
