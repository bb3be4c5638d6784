"""experiments.launch: what each rank is told, how it ends, and that a run stopped on two ranks goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.config import ROOT, load_config
from experiments.launch import environments, run_overrides, wait
from lora_ga.engines import Engine, require_processes
from lora_ga.errors import REQUEUE, SetupError

SMALL = [
    "model=llama_tiny",
    "task=movies",
    "task.sizes.train=64",
    "train.global_batch_size=8",
    "train.per_device_train_batch_size=8",
    "train.autocast=null",
    "eval.limit=16",
]


def test_each_rank_knows_its_place():
    [first, second] = environments(2, {"KEPT": "yes"})
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert first["WORLD_SIZE"] == second["WORLD_SIZE"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"] and first["KEPT"] == "yes"


def test_ranks_go_on_counting_on_the_next_node():
    given = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "1234", "OMP_NUM_THREADS": "7"}
    found = environments(4, given)
    assert [env["RANK"] for env in found] == ["8", "9", "10", "11"]
    assert [env["LOCAL_RANK"] for env in found] == ["0", "1", "2", "3"]
    assert {env["WORLD_SIZE"] for env in found} == {"12"}
    for name in ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"):
        assert {env[name] for env in found} == {given[name]}


def test_nproc_is_short_for_the_launchers():
    assert run_overrides(["launcher=ddp", "nproc=4", "seed=1"]) == ["launcher=ddp", "launcher.nproc=4", "seed=1"]


@pytest.mark.parametrize(("codes", "expected"), [([0, 0], 0), ([75, 75], 75), ([0, 75], 75), ([75, 3], 3)])
def test_the_exit_code_is_that_of_the_worst(codes, expected):
    processes = [subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"]) for code in codes]
    assert wait(processes) == expected


def test_a_rank_that_waits_for_a_dead_one_is_ended(monkeypatch):
    monkeypatch.setattr("experiments.launch.GRACE", 0.2)
    dead = subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"])
    waits = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert wait([dead, waits]) == 128 + signal.SIGSEGV
    assert waits.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launcher.nproc=2"], "launcher=none is one process, launcher.nproc=2: use launcher=ddp"),
        (["launcher=ddp", "launcher.nproc=3"], "does not divide over 3 processes: change launcher.nproc"),
        (["launcher=zero2", "method=adalora"], "AdaLoRA .* use launcher=ddp"),
        (["launcher=zero3", "method=dora"], "DoRA .* use launcher=ddp or zero2"),
        (["launcher=zero3", "method=lora_pro", "model.dtype=bfloat16"], "rounded to bfloat16 .* use launcher=zero2"),
        (["launcher=ddp", "launcher.stage=2"], "launcher.kind=ddp has no ZeRO stage"),
        (["launcher=zero0", "launcher.offload=[optimizer]"], "needs launcher.stage=2 or 3"),
        (["launcher=zero2", "launcher.offload=[parameters]"], "needs launcher.stage=3"),
        (["launcher=horovod"], "horovod"),
    ],
)
def test_what_no_engine_does_is_refused_before_anything_loads(overrides, message):
    with pytest.raises(SetupError, match=message):
        load_config([*SMALL, *overrides])


def _run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *arguments]
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)


def test_one_process_wants_one_gpu(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(SetupError, match="4 are visible: set CUDA_VISIBLE_DEVICES=0"):
        require_processes(Engine())


@pytest.mark.slow
def test_an_engine_wants_its_processes_and_one_process_wants_no_engine():
    alone = _run("experiments.run", "launcher=ddp", *SMALL)
    assert alone.returncode == 2
    assert "use python -m experiments.launch launcher=ddp nproc=2" in alone.stderr.strip().splitlines()[-1]
    several = _run("experiments.run", *SMALL, WORLD_SIZE="2", RANK="0")
    assert several.returncode == 2
    assert "2 processes were started for launcher=none" in several.stderr.strip().splitlines()[-1]


def _curve(folder: Path) -> tuple[list[dict], dict, dict]:
    [path] = folder.glob("*/*.json")
    record = json.loads(path.read_text())
    assert record["status"] == "finished", record["error"]
    curve = [{key: value for key, value in row.items() if key != "seconds"} for row in record["loss_curve"]]
    return curve, record["metrics"], record["environment"]["engine"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "method", "how"),
    [
        ("ddp", "lora_pro", signal.SIGKILL),
        ("zero2", "lora_ga", signal.SIGUSR1),
        ("zero3", "full_ft", signal.SIGTERM),
        ("zero3", "lora_pro", signal.SIGKILL),
    ],
)
def test_a_run_stopped_or_killed_on_two_ranks_goes_on_where_it_was(launcher, method, how, tmp_path):
    def command(name: str) -> list[str]:
        places = [f"records={tmp_path / name}/records", f"outputs={tmp_path / name}/outputs", "checkpoint_every=1"]
        return ["experiments.launch", f"launcher={launcher}", "nproc=2", *SMALL, f"method={method}", *places]

    undisturbed = _run(*command("one"))
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", *command("two")], cwd=ROOT, stdout=log, stderr=log)
        written = "two/outputs/checkpoints/*/checkpoint-*/checkpoint.json"
        while process.poll() is None and not list(tmp_path.glob(written)):
            time.sleep(0.05)
        process.send_signal(how)
        ended = -signal.SIGKILL if how == signal.SIGKILL else REQUEUE
        assert process.wait() == ended, (tmp_path / "log").read_text()
    assert not list(tmp_path.glob("two/records/*/*.json"))
    resumed = _run(*command("two"))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    curve, metrics, engine = _curve(tmp_path / "two" / "records")
    expected, expected_metrics, expected_engine = _curve(tmp_path / "one" / "records")
    assert engine == expected_engine and len(curve) == len(expected) == 8
    for row, wanted in zip(curve, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)
    assert metrics == expected_metrics
    assert not list(tmp_path.glob("two/outputs/checkpoints/*/*"))
