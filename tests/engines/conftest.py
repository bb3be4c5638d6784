"""Connected processes that a test can start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from experiments.launch import environments, wait

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def processes() -> Callable[[int, Path, Sequence[str], Path], None]:
    """processes(n, script, arguments, folder): run the script as n connected ranks; fails with their output."""

    def start(n: int, script: Path, arguments: Sequence[str], folder: Path) -> None:
        logs = [folder / f"{rank}.log" for rank in range(n)]
        started = []
        for log, environment in zip(logs, environments(n, {**os.environ, "OMP_NUM_THREADS": "1"}), strict=True):
            environment["PYTHONPATH"] = str(ROOT)
            with log.open("w") as output:
                command = [sys.executable, str(script), *arguments]
                started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output))
        assert wait(started) == 0, "\n".join(log.read_text()[-3000:] for log in logs)

    return start
