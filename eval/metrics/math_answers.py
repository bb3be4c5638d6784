"""Share of numbers that are right and share that could not be read, as a local module for the `evaluate` library.

`evaluate` copies this file elsewhere and reads its import lines one by one, so it imports nothing of ours.
Numbers arrive as text that `fractions.Fraction` reads ("1080", "-5/2"), the empty text where none was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from statistics import fmean

import datasets
import evaluate


class MathAnswers(evaluate.Metric):
    """Each problem has one number as reference and one or more sampled numbers, which count equal parts of it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of answers equal to the reference as exact numbers, and share without a number.",
            citation="",
            inputs_description="predictions: the samples' numbers of each problem; references: its right number.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("string")),
                    "references": datasets.Value("string"),
                },
            ),
        )

    def _compute(self, predictions: Sequence[Sequence[str]], references: Sequence[str]) -> dict[str, float]:
        right = [
            fmean(bool(sample) and Fraction(sample) == Fraction(reference) for sample in samples)
            for samples, reference in zip(predictions, references, strict=True)
        ]
        # fmean sums exactly, so that the order of the problems cannot show.
        return {
            "accuracy": fmean(right),
            "parse_failures": fmean(fmean(not sample for sample in samples) for samples in predictions),
        }
