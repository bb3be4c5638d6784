"""What is sent, what is not sent twice, and what is refused; sbatch and squeue are fakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.config import ROOT, load_config
from experiments.plan import expand
from slurm.manifest import read_manifest, submissions
from slurm.submit import main

ENDED = "COMPLETED|None"


def sent(tmp_path):
    return submissions(tmp_path / "cluster" / "outputs" / "slurm" / "glue-local")


def queue(submission, *states):
    """squeue's answer: one state|reason per task."""
    return "".join(f"{submission.job}_{index}|{state}|{submission.name}\n" for index, state in enumerate(states))


def test_a_submission_holds_all_that_its_tasks_need(commands, small_sweep, tmp_path, capsys):
    arguments = small_sweep("lora", "lora_pro")
    options = ["slurm=local", "slurm.partition=long", "slurm.time=04:00:00", "slurm.throttle=3", "slurm.gpus=2"]
    assert main([*arguments, *options, 'slurm.extra=["--qos=low"]', 'slurm.setup=["module load cuda"]']) == 0
    assert "job 41" in capsys.readouterr().out

    (submission,) = sent(tmp_path)
    runs, entries = expand(arguments), read_manifest(submission.folder)
    assert [(entry.index, entry.label, entry.run_id) for entry in entries] == [
        (index, run.label, run.config.run_id) for index, run in enumerate(runs)
    ]
    for run, entry in zip(runs, entries, strict=True):
        config = load_config(entry.overrides)
        assert config.run_id == run.config.run_id and config.records_folder == run.config.records_folder
        assert entry.record == str(run.record)
        assert json.loads((submission.folder / f"configs/{entry.index}.json").read_text()) == run.config.resolved

    (call,) = commands.calls("sbatch")
    for option in ("--array=0-1%3", "--partition=long", "--time=04:00:00", "--gres=gpu:2", "--mem=4G", "--qos=low"):
        assert option in call.split()
    assert "--signal=B:USR1@120" in call and "--account" not in call
    assert f"--output={submission.folder}/logs/%a.log" in call and "code/slurm/array.sbatch" in call
    assert (submission.folder / "setup.sh").read_text() == "module load cuda\n"


def test_the_copy_of_the_code_is_the_working_tree_and_says_which_commit(commands, one_run, tmp_path):
    assert main([*one_run, "slurm=local"]) == 0
    (submission,) = submissions(tmp_path / "cluster" / "outputs" / "slurm" / "adhoc-local")
    for name in ("slurm/task.py", "experiments/run.py", "conf/config.yaml", "lora_ga/errors.py"):
        assert (submission.folder / "code" / name).read_bytes() == (ROOT / name).read_bytes()
    said = json.loads((submission.folder / "submission.json").read_text())

    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout

    assert said["commit"] == (git("rev-parse", "HEAD").strip() or None)
    if git("status", "--porcelain", "--untracked-files=no"):
        assert said["dirty"]


def test_one_run_goes_without_an_array(commands, one_run, tmp_path):
    assert main([*one_run, "slurm.gpus=4", "slurm.cpus=16"]) == 0
    (call,) = commands.calls("sbatch")
    assert "--array" not in call and "code/slurm/run.sbatch" in call
    assert "--gres=gpu:4" in call and "--cpus-per-task=16" in call and "/logs/0.log" in call
    (submission,) = submissions(tmp_path / "cluster" / "outputs" / "slurm" / "adhoc-local")
    (entry,) = read_manifest(submission.folder)
    assert submission.job_of(entry) == "41"
    assert load_config(entry.overrides).run_id == load_config(one_run).run_id


def test_only_missing_and_failed_runs_are_sent_again(commands, small_sweep, leave_record, tmp_path, capsys):
    arguments = small_sweep("lora", "rslora", "pissa", "dora", "lora_plus")
    runs = {run.config.method_name: run for run in expand(arguments)}
    assert main([*arguments, "slurm=local"]) == 0
    (first,) = sent(tmp_path)
    order = [entry.label.split()[1] for entry in read_manifest(first.folder)]
    leave_record(runs["lora"], "finished")
    leave_record(runs["rslora"], "diverged")
    leave_record(runs["pissa"], "failed")
    states = {"dora": "CANCELLED|None", "lora_plus": "PENDING|Priority"}
    commands.answer("squeue", queue(first, *(states.get(method, ENDED) for method in order)))
    commands.answer("sbatch", "57;some-cluster\n")

    assert main([*arguments, "slurm=local"]) == 0
    _, second = sent(tmp_path)
    assert {entry.label.split()[1] for entry in read_manifest(second.folder)} == {"pissa", "dora"}
    assert second.job == "57"

    commands.answer(
        "squeue", queue(first, *(states.get(m, ENDED) for m in order)) + queue(second, *["RUNNING|None"] * 2)
    )
    capsys.readouterr()
    assert main([*arguments, "slurm=local"]) == 0
    assert capsys.readouterr().out == "nothing to send\n"
    assert len(sent(tmp_path)) == len(commands.calls("sbatch")) == 2


def test_a_job_of_another_name_with_the_same_number_does_not_count(commands, small_sweep, tmp_path):
    arguments = small_sweep("lora", "rslora")
    assert main([*arguments, "slurm=local"]) == 0
    commands.answer("squeue", "41_0|RUNNING|None|something\n41_1|RUNNING|None|some|thing\n")
    assert main([*arguments, "slurm=local"]) == 0
    assert len(commands.calls("sbatch")) == 2


def test_what_sbatch_refuses_leaves_nothing(commands, small_sweep, tmp_path, capsys):
    commands.answer("sbatch", error="sbatch: error: invalid partition specified: gpu\n", code=1)
    with pytest.raises(SystemExit) as ended:
        main([*small_sweep("lora"), "slurm.partition=gpu"])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: sbatch refused") and "invalid partition" in error and "conf/slurm" in error
    parent = tmp_path / "cluster" / "outputs" / "slurm" / "glue-local"
    assert [path.name for path in parent.iterdir()] == [".lock"]


def test_without_slurm_one_line_says_where_to_go(small_sweep, tmp_path, monkeypatch, capsys):
    git = shutil.which("git")
    (tmp_path / "bare").mkdir()
    if git:
        os.symlink(git, tmp_path / "bare" / "git")
    monkeypatch.setenv("PATH", str(tmp_path / "bare"))
    with pytest.raises(SystemExit) as ended:
        main(small_sweep("lora"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: squeue not found: run this where SLURM's commands are, e.g. on a login node"
    )


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["slurm.partion=gpu"], "unknown key slurm.partion"),
        (["+slurm.partion=gpu"], "unknown key slurm.partion; did you mean partition?"),
        (["slurm=nothing"], "nothing"),
        (["slurm.cpus=0"], "slurm.cpus=0"),
        (["slurm.time=43200"], "slurm.time=43200"),  # what YAML makes of 12:00:00 without quotes
        (["slurm.launcher=horse"], "slurm.launcher=horse is not one of"),
        (["launcher=none"], "slurm.launcher=none"),
        (["nproc=2"], "slurm.nproc=2"),
        (["task=movies", "method=dora", "slurm.launcher=zero3", "slurm.nproc=2"], "DoRA reads whole base weights"),
        (["task=movies", "slurm.launcher=none", "slurm.nproc=2"], "nproc"),
        (["task=movies", "slurm.launcher=zero2", "slurm.nproc=3"], "does not divide over 3 processes"),
        (["experiment=nothing"], "nothing"),
        (["method=nothing"], "nothing"),
        (["experiment=code"], "eval.run_code=true"),
        (["task=cola", "task.data_root=mirror"], "task.data_root=mirror is relative"),
        ([], "say what to send"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_before_anything_is_sent(commands, arguments, mentions, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith("error: ") and mentions in error
    assert not commands.calls("sbatch")


def test_make_sends_with_the_consent_that_code_needs():
    text = (Path(ROOT) / "Makefile").read_text()
    for table in ("glue", "math", "code", "chat"):
        assert f"\nslurm-{table}: assets" in text
    assert text.count('overrides=["eval.run_code=true"]') == 2
