"""Runs as processes of their own, several at once on one machine, each with its share of the cores and GPUs.

A signal to stop is passed on (SIGTERM), the runs get time to save, then they are killed. Runs that share a training
never work at once, in this sweep or another on the machine: the second takes what the first has trained.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from experiments.config import ROOT
from experiments.plan import PlannedRun
from experiments.progress import Display
from lora_ga.errors import REQUEUE

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GRACE_SECONDS = 120.0  # for a step to end and its checkpoint to be written
POLL_SECONDS = 0.2
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class Stopped(Exception):
    """The sweep was told to stop by signal `number`, and its runs have ended."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number if number == signal.SIGINT else REQUEUE


@dataclass(frozen=True)
class Share:
    """What one worker has of the machine: cores it is bound to (empty: none in particular) and its environment."""

    cores: tuple[int, ...]
    environment: dict[str, str]


def share_out(workers: int, processes: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Share]:
    """Disjoint cores where there are enough, threads to match for a run of `processes`, GPUs dealt round robin.

    One worker has the machine as it is. A number of threads that the user has set is kept.
    """
    if workers == 1:
        return [Share((), {})]
    shares = []
    enough = cores if len(cores) >= workers else ()
    for worker in range(workers):
        own = tuple(enough[worker * len(enough) // workers : (worker + 1) * len(enough) // workers])
        threads = str(max(1, len(own) // processes))
        environment = {name: os.environ.get(name, threads) for name in THREAD_VARIABLES}
        if len(gpus) > 1:
            dealt = [gpus[(worker * processes + rank) % len(gpus)] for rank in range(min(processes, len(gpus)))]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(dealt)
        shares.append(Share(own, environment))
    return shares


def _machine() -> tuple[list[int], list[str]]:
    """Cores this process may use, and GPUs by the names CUDA_VISIBLE_DEVICES takes."""
    linux = sys.platform == "linux"
    cores = sorted(os.sched_getaffinity(0)) if linux else list(range(os.cpu_count() or 1))
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return cores, named or [str(index) for index in range(torch.cuda.device_count())]


def in_child(cores: Sequence[int] = ()) -> Callable[[], None]:
    """What a child does first: die with this process, and keep to its cores."""
    parent = os.getpid()

    def prepare() -> None:
        if LIBC is None:
            return
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)

    return prepare


@dataclass(frozen=True)
class Worker:
    """A run at work, on share number `place`; `claim` is held until it has ended."""

    run: PlannedRun
    place: int
    process: subprocess.Popen
    claim: IO[str]
    began: float

    @property
    def log(self) -> Path:
        return log_path(self.run)

    def kill(self) -> None:
        """End the run and whatever it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def log_path(run: PlannedRun) -> Path:
    """Where the output of a run goes."""
    return run.config.outputs / "logs" / run.record.parent.name / f"{run.record.stem}.log"


def claim_training(run: PlannedRun) -> IO[str] | None:
    """The lock of the training this run needs, or None while another run holds it; closing it gives it back."""
    path = run.config.outputs / "trained" / f"{run.config.train_id}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    claim = path.open("w")
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        claim.close()
        return None
    return claim


def command(run: PlannedRun) -> list[str]:
    """The process that executes a run."""
    starter = "experiments.run" if run.config.launcher.kind == "none" else "experiments.launch"
    return [sys.executable, "-m", starter, *run.overrides]


def start(run: PlannedRun, place: int, share: Share, claim: IO[str]) -> Worker:
    """Start a run, its output in a log file; it is a process group of its own, out of reach of a terminal's ctrl-C."""
    path = log_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as output:
        process = subprocess.Popen(
            command(run),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **share.environment},
            start_new_session=True,
            pass_fds=(claim.fileno(),),  # so that the claim lives as long as the run, should the sweep die
            preexec_fn=in_child(share.cores),
        )
    return Worker(run, place, process, claim, time.monotonic())


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals to stop that have come, as they come; a flag and no exception, so that no started run is forgotten."""
    told: list[int] = []
    before = {number: signal.signal(number, lambda number, _: told.append(number)) for number in STOP_SIGNALS}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(workers: Sequence[Worker], told: Sequence[int]) -> None:
    """Tell the runs to stop and wait for them, but not for ever; a further ctrl-C ends the wait."""
    log.info("stopping: %d runs have %.0f s to save; ctrl-C ends them at once", len(workers), GRACE_SECONDS)
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while any(worker.process.poll() is None for worker in workers):
        if time.monotonic() > deadline or signal.SIGINT in told[1:]:
            break
        time.sleep(POLL_SECONDS)


def _outcome(worker: Worker) -> str:
    """How a run ended, in words; an error has been logged unless it is "finished"."""
    code = worker.process.returncode
    if code == 0:
        return "finished"
    if code == REQUEUE:
        log.error("%s: was told to stop; it goes on where it was (log: %s)", worker.run.label, worker.log)
        return "stopped"
    last = (worker.log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    log.error("%s: exit code %d, %s (log: %s)", worker.run.label, code, last, worker.log)
    return "failed"


def _start_next(waiting: list[PlannedRun], place: int, share: Share) -> Worker | None:
    """Start the first waiting run whose training nobody else is at; None if there is none."""
    for run in waiting:
        claim = claim_training(run)
        if claim is not None:
            waiting.remove(run)
            return start(run, place, share, claim)
    return None


def work_through(runs: Sequence[PlannedRun], workers: int) -> int:
    """Execute the runs, at most `workers` at once; the number that did not finish. Stopped once told to and done so."""
    waiting, at_work, unfinished = list(runs), list[Worker](), 0
    processes = max((run.config.launcher.nproc for run in runs), default=1)
    shares = share_out(workers, processes, *_machine())
    display = Display(len(runs), workers)
    with _signals() as told:
        try:
            while (waiting or at_work) and not told:
                busy = {worker.place for worker in at_work}
                for place in (place for place in range(workers) if place not in busy):
                    started = _start_next(waiting, place, shares[place])
                    at_work += [started] if started else []
                time.sleep(POLL_SECONDS)
                for worker in [worker for worker in at_work if worker.process.poll() is not None]:
                    at_work.remove(worker)
                    worker.claim.close()
                    outcome = _outcome(worker)
                    unfinished += outcome != "finished"
                    display.ended(worker.run.label, f"{outcome}, {time.monotonic() - worker.began:.0f} s")
                display.at_work((worker.place, worker.run.label, worker.log) for worker in at_work)
            if told:
                _stop(at_work, told)
                raise Stopped(told[0])
        finally:
            for worker in at_work:  # did not stop in time, or something else went wrong
                worker.kill()
                worker.claim.close()
            display.close()
    return unfinished
