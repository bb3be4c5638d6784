"""All runs of a table, one after another: `python -m experiments.sweep experiment=glue [seeds=3]`.

Finished runs are skipped, a failed one does not stop the others, and whatever kills the sweep costs the run at work
only: a record is the sole mark of a finished run. Each run is a process of its own, so memory figures are its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments.config import ROOT, one_line_errors, require_means
from experiments.plan import PlannedRun, expand

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Two sweeps into one folder would train the same runs: the second waits for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another sweep is at work in %s; waiting for it to end", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_one(run: PlannedRun) -> bool:
    """Execute one run in a process of its own, its output in a log file; True if it finished."""
    log_path = run.config.outputs / "logs" / run.record.parent.name / f"{run.record.stem}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments.run", *run.overrides]
    with log_path.open("w") as output:
        process = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, preexec_fn=_die_with_parent, check=False
        )
    if process.returncode == 0:
        return True
    last = (log_path.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    log.error("%s: exit code %d, %s (log: %s)", run.label, process.returncode, last, log_path)
    return False


def sweep(runs: Sequence[PlannedRun]) -> int:
    """Execute what has no finished record; returns the number of runs that did not finish."""
    failed = 0
    with _only_one(runs[0].record.parent), logging_redirect_tqdm():
        pending = [run for run in runs if run.state != "finished"]
        log.info("%d runs, %d finished before, %d to go", len(runs), len(runs) - len(pending), len(pending))
        bar = tqdm(pending, desc="sweep", unit="run", disable=not pending, mininterval=1)
        for run in bar:
            bar.set_postfix_str(run.label, refresh=True)
            failed += not run_one(run)
    return failed


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 1 if a run did not finish."""
    with one_line_errors():
        runs = expand(arguments)
        for run in runs:
            require_means(run.config)
        failed = sweep(runs)
    if failed:
        log.error("%d runs did not finish; the same command tries them again", failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
