"""All runs of a table: `python -m experiments.sweep experiment=glue [seeds=3] [workers=2]`.

Finished runs are skipped, a failed one does not stop the others, and whatever kills the sweep costs the runs at work
only: a record is the sole mark of a finished run. Each run is a process of its own, so memory figures are its own.
"""

from __future__ import annotations

import fcntl
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from experiments.config import compose_config, one_line_errors, require_means
from experiments.plan import PlannedRun, expand
from experiments.workers import Stopped, work_through
from lora_ga.errors import SetupError

log = logging.getLogger(__name__)


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


def sweep(runs: Sequence[PlannedRun], workers: int = 1) -> int:
    """Execute what has no finished record; returns the number of runs that did not finish."""
    with _only_one(runs[0].record.parent), logging_redirect_tqdm():
        pending = [run for run in runs if run.state != "finished"]
        log.info("%d runs, %d finished before, %d to go", len(runs), len(runs) - len(pending), len(pending))
        return work_through(pending, workers)


def _workers(arguments: Sequence[str]) -> int:
    workers = compose_config(arguments, "sweep").workers
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise SetupError(f"workers={workers}: use how many runs are to work at once, 1 or more")
    return workers


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 1 if a run did not finish, 75 or 130 (ctrl-C) if the sweep was told to stop."""
    with one_line_errors():
        workers = _workers(arguments)
        runs = expand(arguments)
        for run in runs:
            require_means(run.config)
        try:
            failed = sweep(runs, workers)
        except Stopped as stopped:
            log.error("%s; finished runs are kept, the same command goes on", stopped)
            return stopped.exit_code
    if failed:
        log.error("%d runs did not finish; the same command tries them again", failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
