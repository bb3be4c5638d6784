"""W&B as a copy, offline and for real: one run whatever happens to its process, and an upload that can be repeated."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import wandb

from experiments.config import ROOT, load_config
from experiments.tracking import tracked
from experiments.wandb_sync import main as upload
from lora_ga.errors import SetupError
from lora_ga.records import RunRecord

HEADER, CHUNK = 7, struct.Struct("<IHB")  # of a .wandb file and of its chunks: checksum, length, type


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return load_config(["model=llama_tiny", "logger=wandb", f"records={tmp_path}/r", f"outputs={tmp_path}/outputs"])


def record(config, steps=0, status="failed"):
    curve = [{"step": step, "loss": 1 / step} for step in range(1, steps + 1)]
    return RunRecord(
        run_id=config.run_id, experiment="adhoc", scale="local", model="llama_tiny", task="movies", protocol="common",
        protocol_hash="", method="lora", seed=0, learning_rate=1.0, config={}, environment={}, status=status,
        loss_curve=curve, metrics={"accuracy": {"value": 0.5, "n": 2}} if status == "finished" else {},
    )  # fmt: skip


def offline_runs(config):
    return sorted((config.outputs / "wandb").glob("offline-run-*"))


def messages(folder):
    """The records in a run's .wandb file, which is short enough to be one block of chunks."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, position, text, found = path.read_bytes(), HEADER, b"", []
    assert len(data) < 2**15
    while position + CHUNK.size <= len(data):
        _, length, kind = CHUNK.unpack_from(data, position)
        text += data[position + CHUNK.size : position + CHUNK.size + length]
        position += CHUNK.size + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(text))
            text = b""
    return found


def steps(folder):
    return [message.history.step.num for message in messages(folder) if message.WhichOneof("record_type") == "history"]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_the_same_wandb_run(config):
    with pytest.raises(SystemExit), tracked(config, record(config, steps=3)):
        raise SystemExit(75)
    assert wandb.run is None  # finish() was called
    with tracked(config, record(config, steps=5, status="finished")):
        pass
    with tracked(config, record(config, steps=5, status="finished")):  # scored anew: nothing trained, nothing to send
        pass
    assert wandb.run is None
    folders = offline_runs(config)
    assert len(folders) == 3 and all(config.run_id in folder.name for folder in folders)
    assert [steps(folder) for folder in folders] == [[1, 2, 3], [4, 5], []]
    kinds = [{message.WhichOneof("record_type") for message in messages(folder)} for folder in folders]
    assert ["preempting" in kind for kind in kinds] == [True, False, False]
    for folder in folders:
        (began,) = (message.run for message in messages(folder) if message.WhichOneof("record_type") == "run")
        assert (began.run_id, began.run_group) == (config.run_id, "adhoc-local")


@pytest.mark.slow
def test_a_failed_run_is_finished_on_wandb_too(config):
    with tracked(config, record(config, steps=2)):
        pass
    (folder,) = offline_runs(config)
    (end,) = (message.exit for message in messages(folder) if message.WhichOneof("record_type") == "exit")
    assert end.exit_code == 1 and steps(folder) == [1, 2]


def test_wandb_mode_of_the_environment_wins(config, monkeypatch):
    asked = []
    monkeypatch.setattr(wandb, "init", lambda **given: asked.append(given["mode"]) or wandb.sdk.wandb_run.Run)
    from experiments.tracking import _begin

    _begin(config, record(config))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    _begin(config, record(config))
    assert asked == ["offline", "disabled"]


def test_other_ranks_send_nothing(config, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(wandb, "init", lambda **given: pytest.fail("rank 1 has opened a W&B run"))
    with tracked(config, record(config)):
        pass


def test_a_wandb_that_does_not_answer_is_one_line(config, monkeypatch):
    def refuse(**given):
        raise wandb.Error("No API key\nconfigured")

    monkeypatch.setattr(wandb, "init", refuse)
    online = replace(config, logger=replace(config.logger, mode="online"))
    with (
        pytest.raises(SetupError, match=r"No API key configured; use logger\.mode=offline"),
        tracked(online, record(config)),
    ):
        pass


# The upload


def test_nothing_to_upload_is_said(tmp_path, capsys):
    assert upload([str(tmp_path)]) == 0
    assert "no offline W&B run" in capsys.readouterr().out


def test_every_folder_with_waiting_runs_is_uploaded_once(tmp_path, monkeypatch, capsys):
    for place, uploaded in (("a/wandb/offline-run-1-x", False), ("a/wandb/offline-run-2-x", True), ("b/wandb/offline-run-3-y", False), ("c/wandb/offline-run-4-z", True)):  # fmt: skip  # noqa: E501
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "run-x.wandb").touch()
        if uploaded:
            (tmp_path / place / "run-x.wandb.synced").touch()
    calls = []

    def sync(command, check):
        calls.append(command[1:])
        for name in command[4:]:
            for path in (tmp_path / name).glob("offline-run-*/run-x.wandb"):
                path.with_name("run-x.wandb.synced").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", sync)
    assert upload([str(tmp_path)]) == 0
    assert calls == [["-m", "wandb", "sync", f"{tmp_path}/a/wandb", f"{tmp_path}/b/wandb"]]
    assert "2 offline W&B runs to upload" in capsys.readouterr().out
    assert upload([str(tmp_path)]) == 0 and len(calls) == 1


@pytest.mark.slow
def test_without_a_login_the_upload_says_so(config, tmp_path):
    with tracked(config, record(config, steps=2, status="finished")):
        pass
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.wandb_sync", str(config.outputs)],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 1 runs were not uploaded: check the network and the login")
