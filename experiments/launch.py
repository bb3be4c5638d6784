"""One run on several processes: `python -m experiments.launch launcher=zero2 nproc=2 task=movies method=lora`.

Starts what the launcher asks for, one process a rank, and passes on signals and the way it ended. On several nodes each
starts it with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set, as slurm/run.sbatch does.
Differs in: torchrun ends its workers 30 seconds after a signal and hides their exit code; a checkpoint may take longer,
and the code says whether to start again.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from experiments.config import ROOT, load_config, one_line_errors
from experiments.stopping import SIGNALS
from experiments.workers import in_child
from lora_ga.errors import REQUEUE

GRACE = 60.0  # seconds that the other ranks have to notice that one has failed, and the first to write its record


def run_overrides(arguments: Sequence[str]) -> list[str]:
    """Arguments of experiments.run: nproc=N is short for launcher.nproc=N."""
    return [f"launcher.{argument}" if argument.startswith("nproc=") else argument for argument in arguments]


def environments(nproc: int, given: Mapping[str, str]) -> list[dict[str, str]]:
    """What each local process needs to find the others, as torch.distributed's env:// reads it."""
    nodes, node = int(given.get("NNODES", 1)), int(given.get("NODE_RANK", 0))
    address = given.get("MASTER_ADDR", "127.0.0.1")
    port = given.get("MASTER_PORT") or str(_free_port())
    threads = given.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // nproc))
    return [
        {
            **given,
            "RANK": str(node * nproc + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(nproc * nodes),
            "LOCAL_WORLD_SIZE": str(nproc),
            "NNODES": str(nodes),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": threads,
        }
        for local in range(nproc)
    ]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait(processes: Sequence[subprocess.Popen]) -> int:
    """Wait for all; one that fails gives the others GRACE seconds. Returns the first failure's code, REQUEUE or 0."""
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        if deadline == float("inf") and any(process.returncode not in (None, 0, REQUEUE) for process in processes):
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    codes = [process.returncode for process in processes]
    failed = [code for code in codes if code not in (0, REQUEUE)]
    if failed:
        return failed[0] if failed[0] > 0 else 128 - failed[0]  # killed by a signal: the shell's convention
    return REQUEUE if REQUEUE in codes else 0


def main(arguments: Sequence[str]) -> int:
    """Start, pass signals on, wait; a setting that cannot work is refused before any process starts."""
    with one_line_errors():
        overrides = run_overrides(arguments)
        engine = load_config(overrides).launcher
    command = [sys.executable, "-m", "experiments.run", *overrides]
    several = engine.kind != "none"
    settings = environments(engine.nproc, os.environ) if several else [dict(os.environ)]
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, pass_on)
    for setting in settings:
        # A session of their own: a terminal's ctrl-C reaches them through pass_on, once.
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=setting, start_new_session=True, preexec_fn=in_child())
        )
    try:
        return wait(processes)
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
