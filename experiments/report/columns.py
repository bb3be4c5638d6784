"""What a column of a table shows: one metric of one task, in which unit, under which heading."""

from __future__ import annotations

from dataclasses import dataclass

LOSSES = ("eval_loss", "held_out_loss")  # of the gold labels; of the targets of a task answered in words
GRADED = "mt_bench/"  # metrics of this benchmark are a judge's grades
WORDS = {
    "seen": "seen templates",
    "new": "new templates",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "mt_bench": "MT-Bench",
    "exact_match": "exact match",
    "first_turn": "first turn",
    "both_turns": "both turns",
    "held_out_loss": "held-out loss",
    "eval_loss": "loss of the gold labels",
}


@dataclass(frozen=True)
class Unit:
    """How a metric's values are printed: times `factor`, with so many digits."""

    words: str
    factor: float
    digits: int
    lower_is_better: bool = False

    def text(self, value: float) -> str:
        """A value that is already in this unit."""
        return f"{value:.{self.digits}f}"

    def signed(self, value: float) -> str:
        """A difference, never -0.00."""
        return f"{round(value, self.digits) + 0.0:+.{self.digits}f}"


PERCENT = Unit("percent", 100, 2)
LOSS = Unit("nats per target token", 1, 4, lower_is_better=True)
GRADE = Unit("points of 10", 1, 2)  # MT-Bench's judge grades from 1 to 10


def unit(metric: str) -> Unit:
    """The unit of a metric: losses end in "loss", MT-Bench's are grades, everything else is a share."""
    if metric.endswith("loss"):
        return LOSS
    return GRADE if metric.startswith(GRADED) else PERCENT


@dataclass(frozen=True)
class Column:
    """A metric of a task; the metric is "" where a task is planned and nothing says how it is scored."""

    task: str
    metric: str

    @property
    def unit(self) -> Unit:
        return unit(self.metric)

    @property
    def words(self) -> str:
        """The metric for readers: "seen/strict" -> "seen templates, exact match"."""
        return ", ".join(WORDS.get(part, part) for part in self.metric.split("/")) or self.task
