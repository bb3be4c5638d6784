"""On a real SLURM of one node: interrupted runs are requeued and finish, and the table is that of a direct sweep."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.config import ROOT, load_config
from experiments.plan import PlannedRun, expand
from lora_ga.records import read_record
from slurm.manifest import read_exit, read_manifest, submissions
from slurm.queue import command, jobs
from slurm.status import main as status
from slurm.submit import main as submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
STEPS = 40


def python(*words):
    """A command of ours in a process of its own, as its user runs it; its standard output."""
    answer = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return answer.stdout


def wait_for(what, condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen; {command('squeue', '--array', '--states=all')}"
        time.sleep(0.2)


def trains(log: Path, steps: int):
    """Whether some step of a training of `steps` is behind the task."""
    return log.exists() and any(f" {n}/{steps} [" in log.read_text(errors="replace") for n in range(2, steps))


def outcome(submission, index):
    left = read_exit(submission.folder, index)
    return (left.outcome, left.attempt) if left else None


def no_job_left(submission):
    return not any(job.at_work for (_, name), job in jobs().items() if name == submission.name)


def numbers(runs):
    """What a record says of the run and nothing of the machine: metrics and losses, by task and method."""
    records = [read_record(run.record) for run in runs]
    return {
        (record.task, record.method): (record.metrics, [(row["step"], row["loss"]) for row in record.loss_curve])
        for record in records
    }


def table(place):
    """The table's cells with everything behind them; the pages tell seconds and commits, too."""
    python("experiments.report", "experiment=glue", f"records={place}/records", f"out={place}/results")
    return (place / "results" / "tables" / "glue-local.csv").read_text()


def test_an_interrupted_array_gives_the_table_of_a_direct_sweep(node, small_sweep, tmp_path, capsys):
    methods = ("lora", "lora_ga", "lora_pro")
    arguments = small_sweep(*methods, steps=STEPS)
    started = time.monotonic()
    assert submit([*arguments, "slurm=local"]) == 0
    assert time.monotonic() - started < 60  # it does not wait for the runs
    (sent,) = submissions(tmp_path / "cluster" / "outputs" / "slurm" / "glue-local")
    first, second = (sent.job_of(entry) for entry in read_manifest(sent.folder)[:2])
    assert submit([*arguments, "slurm=local"]) == 0  # all of it is in the queue
    assert capsys.readouterr().out.endswith("nothing to send\n")

    wait_for("training of the first run", lambda: trains(sent.folder / "logs" / "0.log", STEPS))
    command("scancel", "--batch", "--signal=TERM", first)
    wait_for("its requeue", lambda: outcome(sent, 0) == ("requeued", 0), 60)
    wait_for("training of the second run", lambda: trains(sent.folder / "logs" / "1.log", STEPS))
    command("scontrol", "requeue", second)
    wait_for("the end of all", lambda: no_job_left(sent), 600)

    assert [outcome(sent, index) for index in range(3)] == [("finished", 1), ("finished", 1), ("finished", 0)]
    capsys.readouterr()
    assert status(["experiment=glue", f"outputs={tmp_path}/cluster/outputs"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 runs: 3 done"

    before = len(jobs())
    assert submit([*arguments, "slurm=local"]) == 0
    assert capsys.readouterr().out == "nothing to send\n" and len(jobs()) == before

    directly = small_sweep(*methods, steps=STEPS, place="directly")
    python("experiments.sweep", *directly)
    assert numbers(expand(arguments)) == numbers(expand(directly))
    assert len(numbers(expand(directly))) == 3
    assert table(tmp_path / "cluster") == table(tmp_path / "directly")


def test_a_run_that_its_user_cancels_stays_cancelled_until_it_is_sent_again(node, one_run, tmp_path, capsys):
    arguments = [*one_run, "train.max_steps=2000", "slurm=local"]
    assert submit(arguments) == 0
    (sent,) = submissions(tmp_path / "cluster" / "outputs" / "slurm" / "adhoc-local")
    wait_for("training", lambda: trains(sent.folder / "logs" / "0.log", 2000))
    command("scancel", sent.job)
    wait_for("the end", lambda: no_job_left(sent), 60)
    capsys.readouterr()
    assert status(["experiment=adhoc", f"outputs={tmp_path}/cluster/outputs"]) == 0
    row, counts = capsys.readouterr().out.splitlines()[1:]
    assert counts == "1 runs: 1 failed" and row.endswith("cancelled")
    assert jobs()[sent.job, sent.name].state == "CANCELLED"

    assert submit(arguments) == 0
    _, again = submissions(sent.folder.parent)
    assert again.job != sent.job
    command("scancel", again.job)
    wait_for("the end", lambda: no_job_left(again), 60)


def test_a_run_out_of_time_is_requeued_and_not_for_ever(node, one_run, tmp_path, capsys):
    limits = ["slurm.time=00:02:00", "slurm.signal_seconds=60", "slurm.max_requeues=1"]
    arguments = [*one_run, "train.max_steps=100000"]
    assert submit([*arguments, "slurm=local", *limits]) == 0
    (sent,) = submissions(tmp_path / "cluster" / "outputs" / "slurm" / "adhoc-local")
    wait_for("the first requeue", lambda: outcome(sent, 0) == ("requeued", 0))
    wait_for("the second attempt", lambda: outcome(sent, 0) == ("running", 1))
    wait_for("the end", lambda: no_job_left(sent))
    left = read_exit(sent.folder, 0)
    assert (left.outcome, left.attempt) == ("failed", 1) and left.reason.startswith("interrupted (SIGUSR1)")
    assert PlannedRun(tuple(arguments), load_config(arguments)).state == "pending"  # no record: it may be sent again
    capsys.readouterr()
    assert status(["experiment=adhoc", f"outputs={tmp_path}/cluster/outputs"]) == 0
    row, _ = capsys.readouterr().out.splitlines()[1:]
    assert row.startswith("failed") and row.endswith("slurm.max_requeues=1")


def test_hydras_own_launcher_finishes_two_seeds(node, one_run, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    needs = {"gpus_per_node": "0", "cpus_per_task": "1", "mem_gb": "4"}
    asked = [f"hydra.launcher.{key}={value}" for key, value in needs.items()]
    python("experiments.run", "-m", "hydra/launcher=submitit_slurm", "seed=0,1", "train.max_steps=2", *one_run, *asked)
    records = sorted((tmp_path / "cluster" / "records" / "adhoc-local").glob("*.json"))
    ended = [(record.seed, record.status) for record in map(read_record, records)]
    assert ended == [(0, "finished"), (1, "finished")]
