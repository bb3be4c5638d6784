"""What a job does: one run of a manifest, `python -m slurm.task FOLDER INDEX`, in the place of the batch shell.

Passes SIGUSR1 (SLURM: time is almost up) and SIGTERM on to the run. A run that was interrupted is requeued and
continues from its checkpoint, or starts anew if it had none yet, at most slurm.max_requeues times.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lora_ga.errors import REQUEUE, SetupError
from lora_ga.records import read_record
from slurm.manifest import Entry, Exit, read_manifest, write_exit
from slurm.queue import command, state_of

log = logging.getLogger(__name__)
ENDED_BY_ITSELF = (0, 1, 2)  # finished; left a record of its failure; refused a setting


def run_command(settings: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """What starts one run."""
    if settings["launcher"] == "none":
        return [sys.executable, "-m", "experiments.run", *overrides]
    engine = [f"launcher={settings['launcher']}", f"nproc={settings['nproc']}"]
    return [sys.executable, "-m", "experiments.launch", *engine, *overrides]


@dataclass
class Process:
    """The run's process, and the signal that this one was sent meanwhile."""

    process: subprocess.Popen[bytes] | None = None
    signalled: int | None = None

    def __post_init__(self) -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signalled = number
        if self.process is not None:
            self.process.send_signal(number)

    def run(self, words: Sequence[str], cpus: int) -> int:
        """Start the process, wait, and return its exit code; it gets the threads that the job has cores."""
        self.process = subprocess.Popen(words, env={"OMP_NUM_THREADS": str(cpus), **os.environ})
        if self.signalled is not None:  # came before there was anything to pass it on to
            self.process.send_signal(self.signalled)
        return self.process.wait()


@dataclass(frozen=True)
class Task:
    """One attempt at one run."""

    folder: Path
    entry: Entry
    settings: Mapping[str, Any]
    attempt: int
    job: str

    def say(self, outcome: str, reason: str = "") -> None:
        """Leave word of how far it has come, for `python -m slurm.status`."""
        log.info("attempt %d of %s: %s %s", self.attempt, self.entry.label, outcome, reason)
        write_exit(self.folder, self.entry.index, Exit(outcome, reason, self.attempt, platform.node()))

    @property
    def ended_before(self) -> bool:
        """Whether an attempt came to its end and was requeued all the same."""
        try:
            return read_record(Path(self.entry.record)).status in ("finished", "diverged")
        except ValueError:
            return False

    def attempt_run(self) -> int:
        """Run once; returns the exit code of the job."""
        limit = self.settings["max_requeues"]
        if self.ended_before:
            self.say("finished")
            return 0
        if self.attempt > limit:
            self.say("failed", f"requeued {self.attempt} times, slurm.max_requeues={limit}")
            return 1
        self.say("running")
        process = Process()
        threads = max(1, self.settings["cpus"] // self.settings["nproc"])
        code = process.run(run_command(self.settings, self.entry.overrides), threads)
        if code == REQUEUE or (process.signalled is not None and code not in ENDED_BY_ITSELF):
            return self.requeue(process.signalled)
        if code == 0:
            self.say("finished")
        else:
            how = f"killed by {signal.Signals(-code).name} (memory?)" if code < 0 else f"exit code {code}"
            self.say("failed", how)
        return 0 if code == 0 else 1

    def requeue(self, number: int | None) -> int:
        """Ask SLURM to start the task again, unless SLURM or the user is ending it, or it has been often enough."""
        limit = self.settings["max_requeues"]
        why = signal.Signals(number).name if number else "asked for by the run"
        try:
            if (state := state_of(self.job)) != "RUNNING":
                self.say("cancelled", f"{why}, job {state.lower() or 'gone'}")
            elif self.attempt >= limit:
                self.say("failed", f"interrupted ({why}) after {self.attempt} requeues, slurm.max_requeues={limit}")
            else:
                self.say("requeued", why)
                command("scontrol", "requeue", self.job)
                return REQUEUE
        except SetupError as error:
            self.say("failed", f"interrupted ({why}) and not requeued: {error}")
        return 1


def job_id(environment: Mapping[str, str]) -> str:
    """This task's own id: SLURM_JOB_ID of an array's last task is that of the whole array, and would requeue all."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def main(arguments: Sequence[str]) -> int:
    """Command line of slurm/*.sbatch."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    folder, index = Path(arguments[0]), int(arguments[1])
    settings = json.loads((folder / "submission.json").read_text())["settings"]
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return Task(folder, read_manifest(folder)[index], settings, attempt, job_id(os.environ)).attempt_run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
