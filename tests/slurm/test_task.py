"""One task of an array, in a process of its own with a stand-in for the run: signals, requeues and their limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.config import ROOT, load_config
from experiments.plan import PlannedRun
from lora_ga.errors import REQUEUE
from slurm.manifest import Entry, read_exit, write_manifest
from slurm.task import job_id

WAITS = "import time; open('started', 'w').close(); time.sleep(60)"
SAVES = f"import signal, sys; [signal.signal(n, lambda *_: sys.exit({REQUEUE})) for n in (10, 12, 15)]; {WAITS}"
RUNNING, LIMIT = "RUNNING\n", 2


@dataclass
class Stage:
    """A submission of one run whose program is `code`, and the task at work on it."""

    folder: Path
    entry: Entry

    def start(self, code, attempt=0):
        package = self.folder / "code" / "experiments"
        package.mkdir(parents=True, exist_ok=True)
        program = f"import sys; open('arguments', 'w').write(repr(sys.argv[1:]))\n{code}\n"
        for name, text in (("__init__", ""), ("run", program), ("launch", program)):
            (package / f"{name}.py").write_text(text)
        array = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
        environment = {**os.environ, **array, "SLURM_RESTART_COUNT": str(attempt), "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", "slurm.task", str(self.folder), "0"]
        return subprocess.Popen(words, cwd=self.folder / "code", env=environment, stderr=subprocess.PIPE, text=True)

    def end(self, code, attempt=0, number=None):
        """(exit code of the task, what it said of itself)."""
        task = self.start(code, attempt)
        if number is not None:
            deadline = time.monotonic() + 30
            while not (self.folder / "code" / "started").exists():
                assert time.monotonic() < deadline and task.poll() is None
                time.sleep(0.02)
            task.send_signal(number)
        _, said = task.communicate(timeout=60)
        assert "Traceback" not in said
        return task.returncode, read_exit(self.folder, 0)


@pytest.fixture
def stage(tmp_path, commands, one_run):
    commands.answer("squeue", RUNNING)
    run = PlannedRun(tuple(one_run), load_config(one_run))
    folder = tmp_path / "submission"
    (folder / "code").mkdir(parents=True)
    entry = Entry(0, run.label, run.config.run_id, str(run.record), run.overrides)
    write_manifest(folder, [entry])
    settings = {"max_requeues": LIMIT, "launcher": "none", "nproc": 1, "cpus": 1}
    (folder / "submission.json").write_text(json.dumps({"settings": settings}))
    return Stage(folder, entry)


def test_a_run_that_finishes_gets_its_overrides_and_is_left_alone(stage, commands):
    code, end = stage.end("")
    assert (code, end.outcome, end.attempt) == (0, "finished", 0)
    assert str(list(stage.entry.overrides))[1:-1] in (stage.folder / "code" / "arguments").read_text()
    assert not commands.calls("scontrol")


def test_a_run_that_asks_for_it_is_requeued_under_the_id_of_its_task(stage, commands):
    code, end = stage.end(f"sys.exit({REQUEUE})", attempt=1)
    assert (code, end.outcome, end.attempt) == (REQUEUE, "requeued", 1)
    assert commands.calls("scontrol") == ["requeue 7_0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("program", [WAITS, SAVES], ids=["dies", "saves"])
def test_a_signal_reaches_the_run_and_the_task_is_requeued(stage, commands, number, program):
    code, end = stage.end(program, number=number)
    assert (code, end.outcome, end.reason) == (REQUEUE, "requeued", number.name)
    assert commands.calls("scontrol") == ["requeue 7_0"]


def test_a_run_that_is_always_interrupted_fails_in_the_end(stage, commands):
    code, end = stage.end(f"sys.exit({REQUEUE})", attempt=LIMIT)
    assert (code, end.outcome) == (1, "failed") and "slurm.max_requeues=2" in end.reason
    code, end = stage.end("open('ran', 'w')", attempt=LIMIT + 1)  # SLURM's own requeues count as well
    assert (code, end.outcome) == (1, "failed") and not (stage.folder / "code" / "ran").exists()
    assert not commands.calls("scontrol")


def test_what_the_user_cancels_stays_cancelled(stage, commands):
    commands.answer("squeue", "COMPLETING\n")
    code, end = stage.end(SAVES, number=signal.SIGTERM)
    assert (code, end.outcome, end.reason) == (1, "cancelled", "SIGTERM, job completing")
    assert not commands.calls("scontrol")


@pytest.mark.parametrize(
    ("program", "reason"),
    [("sys.exit(1)", "exit code 1"), ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL (memory?)")],
)
def test_a_run_that_fails_by_itself_is_not_requeued(stage, commands, program, reason):
    code, end = stage.end(program)
    assert (code, end.outcome, end.reason) == (1, "failed", reason)
    assert not commands.calls("scontrol")


def test_a_requeue_that_slurm_refuses_is_told(stage, commands):
    commands.answer("scontrol", error="Requested operation is presently disabled\n", code=1)
    code, end = stage.end(f"sys.exit({REQUEUE})")
    assert (code, end.outcome) == (1, "failed") and "presently disabled" in end.reason


def test_a_finished_run_that_comes_back_is_not_run_again(stage, one_run, leave_record):
    leave_record(PlannedRun(tuple(one_run), load_config(one_run)), "finished")
    code, end = stage.end("open('ran', 'w')", attempt=1)
    assert (code, end.outcome) == (0, "finished") and not (stage.folder / "code" / "ran").exists()


def test_the_last_task_of_an_array_does_not_requeue_the_whole_array():
    """SLURM gives the array's own number to its last task, and `scontrol requeue <number>` requeues every task."""
    array = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4"}
    assert job_id(array) == "7_4" and job_id({"SLURM_JOB_ID": "7"}) == "7"
