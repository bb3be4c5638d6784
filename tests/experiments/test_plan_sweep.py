"""A plan touches neither model nor data; a sweep skips what is finished, survives what fails, and resumes when killed.

The fast tests replace the run's process by a stand-in; the slow ones train llama_tiny in real processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import experiments.rows
import experiments.run
import experiments.workers
import lora_ga.models
from experiments.config import ROOT, load_config
from experiments.plan import PlannedRun, expand
from experiments.plan import main as plan_main
from experiments.sweep import main as sweep_main
from experiments.sweep import sweep
from lora_ga.errors import SetupError
from lora_ga.records import RunRecord, read_record, write_record

METHODS = {"full_ft", "lora", "rslora", "lora_plus", "dora", "pissa", "adalora", "lora_ga", "lora_one", "lora_pro"}
TINY = [
    "model=llama_tiny",
    "train.max_steps=3",
    "train.autocast=null",
    "task.sizes={train: 48, validation: 16, test: 16}",
    "eval.limit=8",
]


@pytest.fixture
def nothing_loads(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a plan must not load anything")

    monkeypatch.setattr(experiments.run, "load_model", never)
    monkeypatch.setattr(experiments.rows, "load_task", never)
    monkeypatch.setattr(lora_ga.models, "load_model", never)
    monkeypatch.setattr(lora_ga.models, "load_tokenizer", never)
    monkeypatch.setattr(lora_ga.models, "asset", never)


@pytest.fixture
def one_task(tmp_path):
    """one_task("lora", "rslora", overrides): sweep arguments for the movie task, into a folder of this test."""

    def arguments(*methods, more=(), seeds=1):
        return [
            *(f"~experiment.local.methods.{name}" for name in ("full_ft", "lora", "lora_ga", "lora_one", "lora_pro")),
            *(f"+experiment.local.methods.{name}.learning_rate=[1e-3]" for name in methods),
            "experiment.local.tasks=[movies]",
            f"seeds={seeds}",
            f"overrides={json.dumps([*TINY, *more])}",
            f"records={tmp_path}/records",
            f"outputs={tmp_path}/outputs",
        ]

    return arguments


# The plan


@pytest.mark.slow
def test_the_paper_table_is_150_runs_and_loads_nothing(nothing_loads, capsys, tmp_path):
    plan_main(["experiment=glue", "scale=paper", f"records={tmp_path}"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == "150 runs, 0 finished"
    rows = [line.split() for line in lines[1:-1]]
    assert len(rows) == 150
    assert Counter(row[0] for row in rows) == dict.fromkeys(("mnli", "sst2", "cola", "qnli", "mrpc"), 30)
    assert Counter(row[1] for row in rows) == dict.fromkeys(METHODS, 15)
    assert Counter(row[5] for row in rows) == {"0": 50, "1": 50, "2": 50}
    assert {(row[2], row[3], row[4]) for row in rows} == {("t5_base", "lora_ga", "0.0001")}
    assert len({row[6] for row in rows}) == 150  # every run has an id of its own
    assert [row[5] for row in rows] == sorted(row[5] for row in rows)  # a whole table first, then the next seed
    assert not list(tmp_path.iterdir())


def test_overrides_of_a_method_reach_its_runs_alone(nothing_loads, tmp_path):
    runs = expand(["experiment=glue", "scale=paper", "seeds=1", f"records={tmp_path}"])
    assert len(runs) == 50
    gammas = {run.config.method.stable_gamma for run in runs if run.config.method_name == "lora_one"}
    assert gammas == {16.0}
    assert {run.config.method.stable_gamma for run in runs if run.config.method_name == "lora_ga"} == {16.0}


def test_every_learning_rate_of_a_grid_is_a_run(nothing_loads, tmp_path):
    runs = expand(["experiment=glue_lr", f"records={tmp_path}"])
    grid = Counter((run.config.method_name, run.config.task.name) for run in runs)
    assert len(set(grid.values())) == 1 and min(grid.values()) >= 3  # the same budget for each
    assert all(run.config.eval.split == "validation" for run in runs)


def test_a_plan_says_what_is_there_already(nothing_loads, one_task, capsys):
    arguments = one_task("lora", "rslora", "pissa")
    runs = expand(arguments)
    write(runs[0], "finished")
    write(runs[1], "diverged")
    runs[2].record.write_text('{"half": ')
    assert [run.state for run in runs] == ["finished", "diverged", "pending"]
    plan_main(arguments)
    out = capsys.readouterr().out
    assert "3 runs, 1 finished" in out and "diverged" in out


def test_an_override_of_the_sweep_wins_over_the_table(nothing_loads, one_task):
    (run,) = expand(one_task("lora", more=["train.learning_rate=0.5"]))
    assert run.config.train.learning_rate == 0.5
    assert run.config.model.name == "llama_tiny" and run.config.train.max_steps == 3


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["experiment=nothing"], "nothing"),
        (["experiment=glue", "scale=huge"], "huge"),
        (["experiment=glue", "sedes=3"], "sedes"),
        (['overrides=["train.max_stepz=3"]'], "max_stepz"),
        (["overrides=[train.max_steps=3]"], "overrides"),
        (['overrides=["seed=3"]'], "seeds=<how many>"),
        (["+experiment.local.methods.lora.rate=1"], "learning_rate"),
        (["~experiment.local"], "scale=local"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(nothing_loads, arguments, mentions):
    with pytest.raises(SetupError, match=mentions) as caught:
        expand(arguments)
    assert "\n" not in str(caught.value)


# The sweep, with a stand-in for the run's process


def write(run, status):
    c = run.config
    record = RunRecord(
        run_id=c.run_id, experiment=c.experiment_name, scale=c.scale, model=c.model.name, task=c.task.name,
        protocol=c.protocol.name, protocol_hash=c.protocol_hash, method=c.method_name, seed=c.seed,
        learning_rate=c.train.learning_rate, config=dict(c.resolved), environment={}, status=status,
    )  # fmt: skip
    write_record(record, run.record)


@pytest.fixture
def processes(monkeypatch):
    """Commands the sweep started; `fails` names the methods whose process leaves a failed record and code 1."""

    class Processes(list):
        fails: frozenset = frozenset()

    started = Processes()

    class Ended:
        pid = 0

        def __init__(self, command, stdout, cwd, **kwargs):
            run = PlannedRun(tuple(command[3:]), load_config(command[3:]))
            assert command[:3] == [sys.executable, "-m", "experiments.run"] and cwd == ROOT
            started.append(run.config.method_name)
            bad = run.config.method_name in started.fails
            write(run, "failed" if bad else "finished")
            stdout.write("Traceback\nValueError: on purpose\n" if bad else "")
            self.returncode = 1 if bad else 0

        def poll(self):
            return self.returncode

    monkeypatch.setattr(experiments.workers.subprocess, "Popen", Ended)
    monkeypatch.setattr(experiments.workers, "POLL_SECONDS", 0.001)
    return started


def test_finished_runs_are_skipped_and_others_are_not(one_task, processes):
    runs = expand(one_task("lora", "rslora", "pissa"))
    write(runs[0], "finished")
    write(runs[1], "failed")
    before = runs[0].record.stat().st_mtime_ns
    assert sweep(runs) == 0
    assert processes == ["rslora", "pissa"]
    assert runs[0].record.stat().st_mtime_ns == before
    assert sweep(runs) == 0 and len(processes) == 2  # nothing left to do


def test_a_failing_run_stops_nobody_and_is_tried_again(one_task, processes, caplog):
    processes.fails = frozenset({"rslora"})
    arguments = one_task("lora", "rslora", "pissa")
    assert sweep_main(arguments) == 1
    assert processes == ["lora", "rslora", "pissa"]
    assert "movies rslora" in caplog.text and "ValueError: on purpose" in caplog.text
    assert sweep_main(arguments) == 1
    assert processes[3:] == ["rslora"]
    processes.fails = frozenset()
    assert sweep_main(arguments) == 0
    assert processes[4:] == ["rslora"]


def test_a_run_that_dies_without_a_record_counts_as_failed(one_task, monkeypatch, tmp_path):
    ended = SimpleNamespace(pid=0, returncode=-9, poll=lambda: -9)
    monkeypatch.setattr(experiments.workers.subprocess, "Popen", lambda command, **kwargs: ended)
    assert sweep(expand(one_task("lora"))) == 1
    assert not list((tmp_path / "records").rglob("*.json"))


def test_a_damaged_record_is_run_again(one_task, processes):
    (run,) = expand(one_task("lora"))
    write(run, "finished")
    run.record.write_text(run.record.read_text()[:-40])
    assert sweep([run]) == 0 and processes == ["lora"]
    assert read_record(run.record).status == "finished"


def test_records_of_another_setting_do_not_count(one_task, processes):
    assert sweep(expand(one_task("lora"))) == 0
    assert sweep(expand(one_task("lora", more=["train.warmup_ratio=0.5"]))) == 0
    assert processes == ["lora", "lora"]


def test_a_fresh_clone_finds_nothing_finished(nothing_loads):
    """Only the user's own folder counts; the committed baseline never makes a run look done."""
    (one, *_) = expand(["experiment=glue"])
    assert one.record.parent == ROOT / "results" / "runs" / "glue-local"


# The sweep, with real processes


@pytest.mark.slow
def test_a_real_sweep_survives_a_run_that_diverges(one_task, tmp_path):
    good, bad = expand(one_task("lora")), expand(one_task("rslora", more=["train.learning_rate=1e38"]))
    assert sweep([*bad, *good]) == 1
    assert [run.state for run in (*bad, *good)] == ["diverged", "finished"]
    record = read_record(good[0].record)
    assert record.metrics["accuracy"]["n"] == 8 and len(record.loss_curve) == 3
    logs = {path.stem: path.read_text() for path in (tmp_path / "outputs" / "logs").rglob("*.log")}
    assert "Diverged" in logs[bad[0].record.stem] and len(logs) == 2


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, what, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        assert process.poll() is None, f"the sweep ended before {what}"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at the run's process through /proc")
def test_a_killed_sweep_leaves_no_half_record_and_goes_on(one_task, tmp_path):
    arguments = one_task("lora", "rslora", more=["train.max_steps=60"])
    first, second = expand(arguments)
    command = [sys.executable, "-m", "experiments.sweep", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = second.config.outputs / "logs" / second.record.parent.name / f"{second.record.stem}.log"
    try:
        wait_for(lambda: first.record.exists(), "the first run", process)
        wait_for(lambda: log.exists() and "/60 [" in log.read_text(errors="replace"), "training", process)
        at_work = children(process.pid)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(at_work) == 1
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in at_work):
        assert time.monotonic() < deadline, "the run outlived its sweep"
        time.sleep(0.01)

    assert [first.state, second.state] == ["finished", "pending"]
    assert [path.name for path in first.record.parent.iterdir() if path.name != ".lock"] == [first.record.name]
    assert json.loads(first.record.read_text())["status"] == "finished"
    before = first.record.stat().st_mtime_ns

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "2 runs, 1 finished before, 1 to go" in again.stderr
    assert [first.state, second.state] == ["finished", "finished"]
    assert first.record.stat().st_mtime_ns == before
    assert len(read_record(second.record).loss_curve) == 60  # a whole run, not the rest of one
