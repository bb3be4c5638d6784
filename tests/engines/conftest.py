"""Two real processes that a test can start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from experiments.launch import environments, wait

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def two_processes() -> Callable[..., None]:
    """two_processes(script, arguments, folder): run it as two connected ranks; fails with their output."""

    def start(script: Path, arguments: Sequence[str], folder: Path) -> int:
        import os

        folder.mkdir(parents=True, exist_ok=True)
        logs = [folder / f"{rank}.log" for rank in (0, 1)]
        handles = [log.open("w") for log in logs]
        given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), *arguments], cwd=ROOT, env=env, stdout=handle, stderr=subprocess.STDOUT
            )
            for env, handle in zip(environments(2, given), handles, strict=True)
        ]
        code = wait(processes)
        assert code == 0, "\n".join(log.read_text()[-3000:] for log in logs)
        return code

    return start
