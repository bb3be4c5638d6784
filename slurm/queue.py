"""SLURM's own commands, and what they say; accounting (sacct) is not needed."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from lora_ga.errors import SetupError

ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array, as squeue knows it: up to a few minutes after its end."""

    state: str
    reason: str

    @property
    def at_work(self) -> bool:
        """Waiting, running or on its way out: not to be sent again yet."""
        return self.state not in ENDED


def command(*words: str) -> str:
    """The output of one of SLURM's commands; SetupError, in one line, if it is missing or fails."""
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError as error:
        raise SetupError(f"{words[0]} not found: run this where SLURM's commands are, e.g. on a login node") from error
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"{words[0]} did not answer in 60 s: try again when SLURM's controller is back") from error
    if answer.returncode:
        said = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
        raise SetupError(f"{words[0]} refused ({said[:300]}): check conf/slurm, or the cluster with sinfo")
    return answer.stdout


def jobs() -> Mapping[tuple[str, str], Job]:
    """This user's jobs by (id, name): ids alone begin anew on a new cluster. An array's tasks are `<id>_<index>`."""
    lines = command("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%j").splitlines()
    fields = [line.split("|", maxsplit=3) for line in lines]
    return {(job, name): Job(state, reason) for job, state, reason, name in fields}


def state_of(job: str) -> str:
    """The state of one job or task of an array, e.g. RUNNING; COMPLETING when it was cancelled or is being requeued."""
    return command("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip()
