"""A training killed at any moment and started again ends as if nothing had happened: bit by bit the same.

Children are forked and killed with SIGKILL for real; what they leave on disk is all that the next one knows.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch

from lora_ga import checkpoints
from lora_ga.engines import Engine
from lora_ga.errors import SetupError
from lora_ga.training import Resume, Stopped
from tests.engines.training_worker import training

STEPS = 8  # two epochs of four
TRIALS = [
    ("causal", "full_ft"),
    ("causal", "lora"),
    ("causal", "lora_plus"),
    ("causal", "dora"),
    ("causal", "adalora"),
    ("causal", "pissa"),
    ("causal", "lora_ga"),
    ("causal", "lora_one_prec"),
    ("causal", "lora_pro"),
    ("seq2seq", "full_ft"),
    ("seq2seq", "lora_ga"),
    ("seq2seq", "lora_pro"),
]


def train(architecture, name, resume):
    """Two epochs with dropout where the model has some."""
    found = training(architecture, name, Engine(), resume, dropout=0.1, epochs=2)
    curve = [{key: value for key, value in row.items() if key != "seconds"} for row in found["curve"]]
    return {"curve": curve, "weights": found["weights"]}


def _child(architecture, name, folder, every):
    torch.set_num_threads(1)
    found = train(architecture, name, Resume(folder / "checkpoints", every))
    torch.save(found, folder / "result.tmp")
    (folder / "result.tmp").rename(folder / "result.pt")


def start(*arguments):
    process = multiprocessing.get_context("fork").Process(target=_child, args=arguments)
    process.start()
    return process


def step_on_disk(folder: Path) -> int:
    found = checkpoints.latest(folder)
    return int(found.name.removeprefix("checkpoint-")) if found else 0


def equal(one, other):
    assert one["curve"] == other["curve"]
    assert set(one["weights"]) == set(other["weights"])
    assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize(("trial", "architecture", "name"), [(i, *which) for i, which in enumerate(TRIALS)])
def test_killed_and_resumed_is_uninterrupted(trial, architecture, name, tmp_path):
    expected = train(architecture, name, Resume(tmp_path / "none"))
    chance = random.Random(trial)
    killed = 0
    for _ in range(2):
        wanted = chance.randrange(step_on_disk(tmp_path / "checkpoints") + 1, STEPS - 1)
        process = start(architecture, name, tmp_path, 1)
        while process.is_alive() and step_on_disk(tmp_path / "checkpoints") < wanted:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.05)  # anywhere in a step, or while the next checkpoint is written
        process.kill()
        process.join()
        killed += process.exitcode != 0
        if step_on_disk(tmp_path / "checkpoints") >= STEPS - 2:
            break
    assert killed
    process = start(architecture, name, tmp_path, 1)
    process.join()
    assert process.exitcode == 0
    equal(torch.load(tmp_path / "result.pt"), expected)


def test_told_to_stop_it_saves_and_goes_on(tmp_path):
    expected = train("causal", "lora", Resume(tmp_path / "none"))
    asked = iter([False, False, True])
    with pytest.raises(Stopped, match="after step 3 of 8"):
        train("causal", "lora", Resume(tmp_path / "here", None, stop=lambda: next(asked)))
    assert step_on_disk(tmp_path / "here") == 3
    equal(train("causal", "lora", Resume(tmp_path / "here")), expected)


def _stopped_at_two(folder, **identity):
    asked = iter([False, True])
    with pytest.raises(Stopped):
        train("causal", "lora_ga", Resume(folder, None, identity, stop=lambda: next(asked)))


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    _stopped_at_two(tmp_path, train_id="a", model="x")
    with pytest.raises(SetupError, match=r"written with model=x and this run has y: .*delete the checkpoint"):
        train("causal", "lora_ga", Resume(tmp_path, None, {"train_id": "a", "model": "y"}))
    with pytest.raises(SetupError, match="written with model=x and this run has None"):
        train("causal", "lora_ga", Resume(tmp_path, None, {"train_id": "a"}))


def test_what_a_kill_left_half_written_is_not_read(tmp_path):
    expected = train("causal", "lora_ga", Resume(tmp_path / "none"))
    _stopped_at_two(tmp_path / "here")
    [whole] = (tmp_path / "here").glob("checkpoint-*")
    (tmp_path / "here" / ".writing-5").mkdir()
    (tmp_path / "here" / ".writing-5" / "parameters.safetensors").write_bytes(b"half")
    (tmp_path / "here" / "checkpoint-7").mkdir()  # no checkpoint.json: never finished
    assert checkpoints.latest(tmp_path / "here") == whole
    equal(train("causal", "lora_ga", Resume(tmp_path / "here")), expected)


def test_only_the_newest_checkpoint_stays(tmp_path):
    train("causal", "lora", Resume(tmp_path, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    meta = json.loads((tmp_path / "checkpoint-6" / checkpoints.META).read_text())
    assert meta["step"] == 6 and len(meta["curve"]) == 6
    checkpoints.discard(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_start_that_came_out_otherwise_is_put_right(tmp_path, monkeypatch):
    """The start is computed anew on the way back; where it differs, the adapters' own base is restored."""
    import lora_ga.methods.lora_ga as module

    expected = train("causal", "lora_ga", Resume(tmp_path / "none"))
    _stopped_at_two(tmp_path / "here")
    factors = module.lora_ga_factors
    monkeypatch.setattr(module, "lora_ga_factors", lambda *a, **k: tuple(1.5 * f for f in factors(*a, **k)))
    found = train("causal", "lora_ga", Resume(tmp_path / "here"))
    for one, other in zip(found["curve"], expected["curve"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
