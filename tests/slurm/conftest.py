"""A small sweep, and what stands in for SLURM: fake commands on PATH, or a real node that the session brings up."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.plan import PlannedRun
from lora_ga.records import RunRecord, write_record

TINY = ["model=llama_tiny", "train.autocast=null", "task.sizes={train: 48, validation: 16, test: 16}", "eval.limit=8"]
FAKE = """#!/bin/sh
name=$(basename "$0")
echo "$name $*" >> "{folder}/calls"
cat "{folder}/$name.err" >&2 2>/dev/null
cat "{folder}/$name.out" 2>/dev/null
exit $(cat "{folder}/$name.code" 2>/dev/null || echo 0)
"""


@pytest.fixture
def small_sweep(tmp_path: Path) -> Callable[..., list[str]]:
    """small_sweep("lora", "lora_pro"): the movie task by these methods, records and outputs in this test's folder."""

    def arguments(*methods: str, steps: int = 3, place: str = "cluster") -> list[str]:
        return [
            "experiment=glue",
            *(f"~experiment.local.methods.{name}" for name in ("full_ft", "lora", "lora_ga", "lora_one", "lora_pro")),
            *(f"+experiment.local.methods.{name}.learning_rate=[1e-3]" for name in methods),
            "experiment.local.tasks=[movies]",
            f"overrides={json.dumps([*TINY, f'train.max_steps={steps}'])}",
            f"records={tmp_path}/{place}/records",
            f"outputs={tmp_path}/{place}/outputs",
        ]

    return arguments


@pytest.fixture
def one_run(tmp_path: Path) -> list[str]:
    """The arguments of one run, into the same folders."""
    places = [f"records={tmp_path}/cluster/records", f"outputs={tmp_path}/cluster/outputs"]
    return [*TINY, "task=movies", "method=lora", *places]


class Commands:
    """SLURM's commands as scripts that note how they were called and answer what a test wants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("sbatch", "squeue", "scontrol"):
            (folder / name).write_text(FAKE.format(folder=folder))
            (folder / name).chmod(0o755)

    def answer(self, name: str, out: str = "", error: str = "", code: int = 0) -> None:
        for suffix, text in (("out", out), ("err", error), ("code", str(code))):
            (self.folder / f"{name}.{suffix}").write_text(text)

    def calls(self, name: str) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.partition(" ")[2] for line in lines if line.partition(" ")[0] == name]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Fake sbatch, squeue and scontrol, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    fake = Commands(folder)
    fake.answer("sbatch", "41\n")
    return fake


@pytest.fixture
def leave_record() -> Callable[..., None]:
    """leave_record(run, "failed"): what the run would have left."""

    def leave(run: PlannedRun, status: str, error: str | None = None) -> None:
        c = run.config
        record = RunRecord(
            run_id=c.run_id, experiment=c.experiment_name, scale=c.scale, model=c.model.name, task=c.task.name,
            protocol=c.protocol.name, protocol_hash=c.protocol_hash, method=c.method_name, seed=c.seed,
            learning_rate=c.train.learning_rate, config=dict(c.resolved), environment={}, status=status, error=error,
        )  # fmt: skip
        write_record(record, run.record)

    return leave


@pytest.fixture(scope="session")
def node(debian: Callable[..., None]) -> Iterator[None]:
    """A real SLURM of one node, which every command of the session's tests uses."""
    if os.geteuid() != 0:
        pytest.skip("a node's daemon needs root")
    debian("slurm-wlm", "munge", commands=("slurmctld", "slurmd", "munged", "mungekey"))
    folder = Path(tempfile.mkdtemp(prefix="one-node-"))
    folder.chmod(0o755)  # munge's socket has to be within everybody's reach
    script = Path(__file__).with_name("one_node.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder / "node")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    before = os.environ.get("SLURM_CONF")
    try:
        ready, _, _ = select.select([process.stdout], [], [], 90)
        said = process.stdout.readline() if ready else ""
        logs = {path.name: path.read_text(errors="replace")[-600:] for path in folder.rglob("*.log")}
        assert said.startswith("export SLURM_CONF="), f"the node did not come up: {logs}"
        os.environ["SLURM_CONF"] = said.strip().partition("=")[2]
        yield
    finally:
        process.stdin.close()
        process.wait(60)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)
