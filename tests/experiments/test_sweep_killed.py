"""A sweep that is killed at any moment, with one worker or two, and started again gives the table of one left alone.

The moments are drawn from a seeded generator; what is claimed must hold at every moment, so no result hangs on them.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from experiments.config import ROOT
from experiments.plan import expand
from experiments.report.__main__ import main as report
from experiments.report.loading import read_entries
from lora_ga.records import read_record

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="sweeps by fork")
METHODS = ("full_ft", "lora", "lora_ga", "lora_pro")
TINY = [
    "model=llama_tiny",
    "train.max_steps=12",
    "train.autocast=null",
    "task.sizes={train: 96, validation: 16, test: 16}",
    "eval.limit=8",
]
KILLS = 5  # for each number of workers
KILLS_A_SWEEP = 5


def arguments(folder, workers):
    return [
        "~experiment.local.methods.lora_one",
        "experiment.local.tasks=[movies]",
        f"overrides={json.dumps(TINY)}",
        f"workers={workers}",
        f"records={folder}/records",
        f"outputs={folder}/outputs",
    ]


def tables(folder):
    """The report's files without what a clock or a memory gauge has measured."""
    where = [f"records={folder}/records", f"baseline={folder}/none", f"out={folder}"]
    assert report(["experiment=glue", *where]) == 0
    found = {suffix: (folder / "tables" / f"glue-local{suffix}").read_text() for suffix in (".csv", ".tex", ".md")}
    sections = re.split(r"(?m)^(?=## )", found.pop(".md"))
    measured = ("## Convergence", "## Cost", "## Quality against memory and time")
    assert sum(section.startswith(measured) for section in sections) >= 2
    return {**found, "page": "".join(section for section in sections if not section.startswith(measured))}


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """sweeps(arguments): pid of a sweep that has begun, and a function that waits for its exit code."""
    script = Path(__file__).with_name("sweep_by_fork.py")
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    log = tmp_path_factory.mktemp("sweeps") / "log"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        log.open("w") as stderr,
        subprocess.Popen([sys.executable, str(script)], stderr=stderr, cwd=ROOT, env=environment, **pipes) as starter,
    ):

        def begin(given):
            print(json.dumps(given), file=starter.stdin, flush=True)
            return int(starter.stdout.readline()), lambda: int(starter.stdout.readline())

        yield begin
        starter.stdin.close()


def whole(sweeps, folder, workers):
    _, ended = sweeps(arguments(folder, workers))
    assert ended() == 0
    return tables(folder)


@pytest.fixture(scope="module")
def undisturbed(sweeps, tmp_path_factory):
    """Tables of a sweep that nobody killed, and the seconds it took."""
    began = time.monotonic()
    found = whole(sweeps, tmp_path_factory.mktemp("undisturbed"), 1)
    assert all(name in found[".csv"] for name in METHODS)
    return found, time.monotonic() - began


def check(folder, runs):
    """What a killed sweep leaves behind: whole records of finished runs, and nothing else that is read."""
    assert {run.state for run in runs} <= {"finished", "pending"}
    entries, skipped = read_entries(runs[0].record.parent, "glue", "local")
    assert skipped == []
    assert {entry.file for entry in entries} == {run.record.name for run in runs if run.state == "finished"}
    assert all(len(entry.record.loss_curve) == 12 for entry in entries)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_killed_at_random_moments_ends_with_the_same_tables(sweeps, undisturbed, tmp_path, workers):
    expected, seconds = undisturbed
    moments, kills, rounds = random.Random(workers), 0, 0
    while kills < KILLS:
        folder = tmp_path / f"round{rounds}"
        rounds += 1
        runs = expand(arguments(folder, workers))
        for _ in range(KILLS_A_SWEEP):
            pid, ended = sweeps(arguments(folder, workers))
            time.sleep(moments.uniform(0, 0.7 * seconds))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = ended()
            assert code in (-signal.SIGKILL, 0)
            check(folder, runs)
            if code == 0:
                break
            kills += 1
        assert whole(sweeps, folder, workers) == expected
        check(folder, runs)
    assert kills >= KILLS


@pytest.mark.slow
def test_two_workers_give_the_tables_of_one(undisturbed, tmp_path):
    """With the real command, each run a fresh interpreter."""
    command = [sys.executable, "-m", "experiments.sweep", *arguments(tmp_path, 2)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 of 4: movies" in done.stderr and "\r" not in done.stderr  # plain lines where there is no terminal
    assert tables(tmp_path) == undisturbed[0]


@LINUX
@pytest.mark.slow
def test_a_run_killed_while_it_writes_its_record_leaves_none(tmp_path):
    """The kill falls between the temporary file and its renaming, where a careless writer would lose."""
    (first, *_) = expand(arguments(tmp_path, 1))
    program = (
        "import os, signal, sys; from experiments.config import load_config; from experiments.run import run\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(load_config(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, *first.overrides]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == -signal.SIGKILL
    (left,) = first.record.parent.iterdir()
    assert left.suffix == ".tmp" and read_record(left).status == "finished"  # whole, and yet no record
    assert first.state == "pending"
    assert read_entries(first.record.parent, "glue", "local") == ([], [])
