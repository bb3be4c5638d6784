"""Send runs to SLURM and return: `python -m slurm.submit experiment=glue [scale=paper] [slurm=mine] [slurm.time=..]`.

With experiment=.., the runs of that table as one array; otherwise one run: `python -m slurm.submit task=metamath
method=lora_ga slurm.gpus=4 ..`. Finished and diverged runs are not sent, nor those that an earlier submission has in
the queue; failed ones are sent again.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.config import ROOT, check_engine, load_config, one_line_errors, require_means
from experiments.plan import PlannedRun, expand
from lora_ga.errors import SetupError
from lora_ga.records import write_atomic
from slurm.manifest import Entry, Submission, log_path, read_manifest, submissions, write_job, write_manifest
from slurm.queue import command, jobs
from slurm.settings import Settings, engine_of, read_settings, split
from slurm.snapshot import snapshot

log = logging.getLogger(__name__)


def planned(arguments: Sequence[str]) -> list[PlannedRun]:
    """The runs of a table if there is an experiment=.., else the one run that the arguments describe."""
    if not arguments:
        raise SetupError("say what to send: experiment=glue, or one run: task=.. method=..")
    if any(argument.startswith("experiment=") for argument in arguments):
        return expand(arguments)
    return [PlannedRun(tuple(arguments), load_config(arguments))]


def require_full_paths(runs: Sequence[PlannedRun]) -> None:
    """SetupError for a relative path to data: jobs run in a copy of the code, from where it leads nowhere."""
    given = {name: os.environ.get(name) for name in ("LORA_GA_DATA_ROOT", "LORA_GA_CACHE")}
    given |= {"task.data_root": next((run.config.task.data_root for run in runs if run.config.task.data_root), None)}
    for name, path in given.items():
        if path and not Path(path).is_absolute():
            raise SetupError(f"{name}={path} is relative, and jobs run elsewhere: give the full path")


def in_queue(parent: Path) -> set[str]:
    """The records that earlier submissions will still bring."""
    queue = jobs()
    return {
        entry.record
        for earlier in submissions(parent)
        for entry in read_manifest(earlier.folder)
        if (job := queue.get((earlier.job_of(entry), earlier.name))) and job.at_work
    }


def _entry(index: int, run: PlannedRun) -> Entry:
    """The run as a line of the manifest; the copy of the code is elsewhere, so its folders are given in full."""

    def escape(path: Path) -> str:
        return str(path).replace("'", "\\'")  # as Hydra reads it

    folders = {"records": run.config.records, "outputs": run.config.outputs}
    others = [override for override in run.overrides if override.partition("=")[0] not in folders]
    quoted = [f"{key}='{escape(path)}'" for key, path in folders.items()]
    return Entry(index, run.label, run.config.run_id, str(run.record), (*others, *quoted))


def prepare(folder: Path, runs: Sequence[PlannedRun], settings: Settings) -> None:
    """Fill the folder of a submission: everything its tasks read."""
    (folder / "logs").mkdir()
    code = snapshot(folder / "code")
    write_manifest(folder, [_entry(index, run) for index, run in enumerate(runs)])
    for index, run in enumerate(runs):
        write_atomic(folder / "configs" / f"{index}.json", json.dumps(run.config.resolved, indent=1) + "\n")
    write_atomic(folder / "setup.sh", "".join(f"{line}\n" for line in settings.setup))
    about = {**code, "python": sys.executable, "settings": dataclasses.asdict(settings)}
    write_atomic(folder / "submission.json", json.dumps(about, indent=1) + "\n")


def send(folder: Path, count: int, settings: Settings) -> Submission:
    """Hand a prepared folder to sbatch: an array, or a plain job if it is one run."""
    name, array = f"{folder.parent.name}/{folder.name}", count > 1
    script = folder / "code" / "slurm" / ("array.sbatch" if array else "run.sbatch")
    log_file = log_path(folder, "%a" if array else 0)
    options = ["--parsable", f"--job-name={name}", f"--chdir={ROOT}", f"--output={log_file}", *settings.options()]
    options += [f"--array=0-{count - 1}%{settings.throttle}"] if array else []
    answer = command("sbatch", *options, str(script), str(folder), sys.executable)
    return Submission(folder, answer.strip().partition(";")[0], name, array)


def submit(runs: Sequence[PlannedRun], settings: Settings) -> Submission | None:
    """Send the runs that need it; None if there are none."""
    parent = runs[0].config.outputs / "slurm" / runs[0].record.parent.name
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / ".lock").open("w") as lock:  # two at once would not see each other's runs
        fcntl.flock(lock, fcntl.LOCK_EX)
        open_runs = [run for run in runs if run.state not in ("finished", "diverged")]
        waiting = in_queue(parent)
        to_send = [run for run in open_runs if str(run.record) not in waiting]
        ended, queued = len(runs) - len(open_runs), len(open_runs) - len(to_send)
        log.info("%d runs: %d have ended, %d in the queue, %d to send", len(runs), ended, queued, len(to_send))
        if not to_send:
            return None
        folder = parent / datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
        folder.mkdir()
        try:
            prepare(folder, to_send, settings)
            submission = send(folder, len(to_send), settings)
        except BaseException:
            shutil.rmtree(folder)
            raise
        write_job(submission)
        return submission


def main(arguments: Sequence[str]) -> int:
    """Command line; returns as soon as SLURM has taken the runs."""
    with one_line_errors():
        ours, others = split(arguments)
        settings = read_settings(ours)
        runs = planned(others)
        engine = engine_of(settings)
        for run in runs:
            require_means(run.config)
            check_engine(run.config, engine)
        require_full_paths(runs)
        submission = submit(runs, settings)
        if submission is None:
            print("nothing to send")
        else:
            experiment = runs[0].config.experiment_name
            print(f"job {submission.job}: {submission.folder}")
            print(f"where it stands: python -m slurm.status experiment={experiment} scale={runs[0].config.scale}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
