"""Several runs at once: shares of the machine, trainings that are not done twice, a stop that loses and leaves nothing.

The runs are small shell programs in real processes; what they wait for is a file or a signal, never a time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import experiments.workers
from experiments.plan import expand
from experiments.progress import Display, last_progress
from experiments.sweep import main as sweep_main
from experiments.workers import Stopped, claim_training, log_path, share_out, work_through

THREADS = "OMP_NUM_THREADS"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """runs(program, *overrides): a sweep of two methods whose runs are `program`, in bash, in a folder of this test."""
    monkeypatch.setattr(experiments.workers, "POLL_SECONDS", 0.01)

    def make(program, *overrides):
        monkeypatch.setattr(experiments.workers, "command", lambda run: ["bash", "-c", f"cd {tmp_path}; {program}"])
        drop = ("full_ft", "lora_ga", "lora_one")
        return expand(
            [
                *(f"~experiment.local.methods.{name}" for name in drop),
                "experiment.local.tasks=[movies]",
                *(overrides or ['overrides=["model=llama_tiny"]']),
                f"records={tmp_path}/records",
                f"outputs={tmp_path}/outputs",
            ]
        )

    return make


# Shares of the machine


def test_cores_are_dealt_without_overlap_and_threads_follow(monkeypatch):
    monkeypatch.delenv(THREADS, raising=False)
    shares = share_out(3, 1, list(range(8)), [])
    assert [share.cores for share in shares] == [(0, 1), (2, 3, 4), (5, 6, 7)]
    assert [share.environment[THREADS] for share in shares] == ["2", "3", "3"]
    assert {share.environment[THREADS] for share in share_out(2, 2, list(range(8)), [])} == {"2"}  # of two ranks each


def test_one_worker_has_the_machine_as_it_is():
    (share,) = share_out(1, 1, list(range(8)), ["0", "1"])
    assert (share.cores, share.environment) == ((), {})


def test_more_workers_than_cores_are_not_bound(monkeypatch):
    monkeypatch.delenv(THREADS, raising=False)
    shares = share_out(3, 1, [4, 5], [])
    assert {share.environment[THREADS] for share in shares} == {"1"}
    assert not any(share.cores for share in shares)


def test_a_number_of_threads_that_was_set_is_kept(monkeypatch):
    monkeypatch.setenv(THREADS, "1")
    assert {share.environment[THREADS] for share in share_out(2, 1, list(range(8)), [])} == {"1"}


@pytest.mark.parametrize(
    ("workers", "processes", "gpus", "dealt"),
    [
        (3, 1, ["0", "1"], ["0", "1", "0"]),
        (2, 2, ["4", "5", "6", "7"], ["4,5", "6,7"]),
        (2, 1, ["0"], [None, None]),  # one GPU is shared as it is
        (2, 1, [], [None, None]),
    ],
)
def test_gpus_go_round(workers, processes, gpus, dealt):
    shares = share_out(workers, processes, [0, 1], gpus)
    assert [share.environment.get("CUDA_VISIBLE_DEVICES") for share in shares] == dealt


# At work


def test_two_runs_work_at_once_each_with_its_own_log_and_cores(runs, tmp_path):
    waits = "touch $$; until [ $(ls [0-9]* | wc -l) = 2 ]; do sleep 0.01; done"  # for each other
    both = runs(f"{waits}; grep Cpus_allowed_list /proc/self/status; echo threads $OMP_NUM_THREADS")
    assert work_through(both, 2) == 0
    logs = [log_path(run).read_text() for run in both]
    assert len(logs) == 2 and all("threads 1" in text for text in logs)
    if sys.platform == "linux" and len(os.sched_getaffinity(0)) >= 2:
        assert logs[0] != logs[1]


def test_runs_that_share_a_training_never_work_at_once(runs):
    """mkdir fails for whoever comes while another is in."""
    protocols = "+experiment.local.scored_under=[common,lora_ga,lora_one]"
    shared = runs(
        "mkdir in || exit 1; sleep 0.05; rmdir in",
        "experiment.local.tasks=[word_problems]",
        protocols,
        "~experiment.local.methods.lora_pro",
    )
    assert len(shared) == 3 and len({run.config.train_id for run in shared}) == 1
    assert len({run.config.run_id for run in shared}) == 3
    assert work_through(shared, 3) == 0


def test_a_training_is_claimed_by_one_at_a_time(runs):
    first, other = runs("true")
    claim = claim_training(first)
    assert claim is not None and claim_training(first) is None
    for held in (claim_training(other), claim):
        assert held is not None
        held.close()
    again = claim_training(first)
    assert again is not None
    again.close()


def test_a_failure_is_told_with_its_last_line_and_stops_nobody(runs, caplog):
    failing = runs('if mkdir first; then echo "went wrong"; exit 3; fi')
    assert work_through(failing, 1) == 1
    assert "exit code 3, went wrong" in caplog.text


# Stopping


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def stopped_by(number, runs, *after):
    """Send this process the signal when both runs have said "ready", and again for each further word in `after`."""

    def said(word):
        return all(log_path(run).exists() and word in log_path(run).read_text() for run in runs)

    def send():
        for word in ("ready", *after):
            while not said(word):
                time.sleep(0.01)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(Stopped) as caught:
        work_through(runs, 2)
    thread.join()
    return caught.value


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75)]
)
def test_a_signal_is_passed_on_and_the_runs_may_save(runs, tmp_path, number, code):
    polite = runs("trap 'echo kept > saved-$$; exit 75' TERM; echo ready; while :; do sleep 0.01; done")
    before = signal.getsignal(number)
    assert stopped_by(number, polite).exit_code == code
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert signal.getsignal(number) is before
    for run in polite:  # and their trainings are free again
        claim = claim_training(run)
        assert claim is not None
        claim.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")
def test_who_does_not_stop_is_killed_with_all_it_started(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.workers, "GRACE_SECONDS", 0.0)
    deaf = "trap '' TERM; bash -c 'echo $$ > child-$$; echo $PPID > parent-$$; echo ready; sleep 1000 & wait'"
    stopped_by(signal.SIGTERM, runs(f"{deaf}; true"))
    pids = [int(path.read_text()) for path in tmp_path.glob("*-*")]
    assert len(pids) == 4
    deadline = time.monotonic() + 20  # SIGKILL is sent, the kernel takes its moment
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process outlived its sweep"
        time.sleep(0.01)


def test_a_second_ctrl_c_ends_the_wait(runs):
    deaf = runs("trap 'echo so what' TERM; echo ready; while :; do sleep 0.01; done")
    assert stopped_by(signal.SIGINT, deaf, "so what").exit_code == 130


@pytest.mark.parametrize("workers", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_workers_is_refused(workers, capsys):
    with pytest.raises(SystemExit) as caught:
        sweep_main([f"workers={workers}"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: workers=")


# The display


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "starts"),
        ("loading\nconverting the model\n", "converting the model"),
        ("train:   0%|  | 0/9 [00:00<?, ?step/s]\rtrain:  44%|█ | 4/9 [00:02<00:03]", "train 4/9 [00:02<00:03]"),
        (
            "train: 100%|██| 9/9 [00:04<00:00]\nclassify:  50%|█ | 4/8 [00:01<?]",
            "classify 4/8 [00:01<?]",
        ),
    ],
)
def test_the_last_progress_is_read_from_a_log(tmp_path, text, shown):
    (tmp_path / "log").write_text(text)
    assert last_progress(tmp_path / "log") == shown


def test_no_log_yet_is_a_start(tmp_path):
    assert last_progress(tmp_path / "none") == "starts"


def test_without_a_terminal_there_are_plain_lines(caplog, capsys, monkeypatch, tmp_path):
    (tmp_path / "log").write_text("train:  44%|██ | 4/9 [00:02<00:03]")
    monkeypatch.setattr("experiments.progress.PLAIN_SECONDS", -1.0)
    with caplog.at_level("INFO"):
        display = Display(2, 1)
        display.at_work([(0, "movies lora", tmp_path / "log")])
        display.ended("movies lora", "finished, 3 s")
        display.close()
    assert [record.message for record in caplog.records] == [
        "at work: movies lora: train 4/9 [00:02<00:03]",
        "1 of 2: movies lora finished, 3 s",
    ]
    assert "\r" not in capsys.readouterr().err


def test_on_a_terminal_every_worker_has_a_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "log").write_text("train:  44%|██ | 4/9 [00:02<00:03]")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    display = Display(2, 2)
    display.at_work([(1, "movies lora", tmp_path / "log")])
    display.ended("movies lora", "finished")
    display.close()
    err = capsys.readouterr().err
    assert "movies lora: train 4/9" in err and "1/2" in err
