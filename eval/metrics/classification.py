"""Accuracy, Matthews correlation and F1 as one local module for the `evaluate` library, on scikit-learn.

`evaluate` copies this file elsewhere and reads its import lines one by one, so it imports nothing of ours.
Source of the choice: Wang et al. 2019 (GLUE), table 1; F1 is of class 1 for two classes and macro-averaged for more.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


class ClassificationScores(evaluate.Metric):
    """Scores of predicted class numbers against the true ones."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, Matthews correlation and F1 of predicted class numbers.",
            citation="",
            inputs_description="predictions, references: class numbers; num_labels: how many classes the task has.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")},
            ),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int], num_labels: int = 2) -> dict[str, float]:
        # labels=[1] is scikit-learn's "binary", but survives a subset in which only class 0 occurs.
        labels = [1] if num_labels == 2 else None
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "matthews_correlation": float(matthews_corrcoef(references, predictions)),
            "f1": float(f1_score(references, predictions, labels=labels, average="macro", zero_division=0)),
        }
