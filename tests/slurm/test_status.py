"""The table of where the runs stand, from records, exit files and one call of squeue."""

from __future__ import annotations

import pytest

from experiments.plan import expand
from slurm.manifest import Exit, read_manifest, submissions, write_exit
from slurm.queue import Job
from slurm.status import SILENT, judge, main
from slurm.submit import main as submit


class Record:
    """As much of a record as the table looks at."""

    def __init__(self, status, error=None):
        self.status, self.error = status, error


def end(outcome, reason="", attempt=0):
    return Exit(outcome, reason, attempt, "node1")


@pytest.mark.parametrize(
    ("record", "job", "left", "expected"),
    [
        (Record("finished"), None, None, ("done", "")),
        (Record("finished"), Job("CANCELLED", "None"), end("cancelled"), ("done", "")),
        (Record("diverged", "Diverged: step 3"), None, end("failed"), ("diverged", "Diverged: step 3")),
        (None, Job("PENDING", "Priority"), None, ("pending", "Priority")),
        (Record("failed", "old"), Job("PENDING", "Priority"), None, ("pending", "Priority")),
        (None, Job("PENDING", "BeginTime"), end("requeued", "SIGUSR1"), ("requeued", "SIGUSR1 BeginTime")),
        (None, Job("RUNNING", "None"), end("running", attempt=2), ("running", "")),
        (None, Job("COMPLETING", "None"), end("running"), ("running", "completing")),
        (None, Job("TIMEOUT", "TimeLimit"), end("running"), ("failed", "timeout TimeLimit")),
        (None, Job("NODE_FAIL", "None"), end("running"), ("failed", "node_fail")),
        (Record("failed", "old"), Job("CANCELLED", "None"), end("running"), ("failed", "cancelled")),
        (Record("failed", "ValueError: x"), Job("FAILED", "NonZeroExitCode"), end("failed", "exit code 1"),
         ("failed", "ValueError: x")),
        (None, None, end("failed", "exit code 2"), ("failed", "exit code 2")),
        (None, None, end("cancelled", "SIGTERM"), ("failed", "cancelled: SIGTERM")),
        (None, None, end("running"), ("failed", SILENT)),
        (None, None, None, ("failed", SILENT)),
    ],
)  # fmt: skip
def test_each_state_has_its_reason(record, job, left, expected):
    assert judge(record, job, left) == expected


def test_the_table_shows_every_run_once_with_its_log(commands, small_sweep, leave_record, tmp_path, capsys):
    arguments = small_sweep("lora", "rslora", "pissa")
    runs = expand(arguments)
    assert submit([*arguments, "slurm=local"]) == 0
    (sent,) = submissions(tmp_path / "cluster" / "outputs" / "slurm" / "glue-local")
    leave_record(runs[0], "finished")
    leave_record(runs[1], "failed", "RuntimeError: two\nlines")
    write_exit(sent.folder, 1, end("failed", "exit code 1"))
    write_exit(sent.folder, 2, end("running", attempt=1))
    commands.answer("squeue", f"41_1|FAILED|NonZeroExitCode|{sent.name}\n41_2|RUNNING|None|{sent.name}\n")
    capsys.readouterr()

    assert main(["experiment=glue", f"outputs={tmp_path}/cluster/outputs"]) == 0
    _, *rows, counts = capsys.readouterr().out.splitlines()
    assert counts == "3 runs: 1 done, 1 running, 1 failed"
    assert [row.split()[0] for row in rows] == ["done", "failed", "running"]
    for row, entry in zip(rows, read_manifest(sent.folder), strict=True):
        assert entry.label in row and f"{sent.folder}/logs/{entry.index}.log" in row
    assert rows[1].endswith("RuntimeError: two lines") and rows[2].split()[-2] == "1"
    assert len(commands.calls("squeue")) == 2  # one for the submission, one for the table


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["experiment=glue", "scale=paper"], "nothing was sent"),
        ([], "experiment=glue"),
        (["expriment=glue"], "experiment=.."),
        (["experiment=../x"], "experiment=glue"),
    ],
)
def test_a_wrong_question_is_answered_in_one_line(arguments, mentions, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, f"outputs={tmp_path}"])
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and mentions in error and "\n" not in error
