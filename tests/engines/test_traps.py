"""The engines' silent traps, provoked: each ends the training at once with a message that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traps")
    processes(1, Path(__file__).with_name("trap_worker.py"), [str(folder)], folder)
    return json.loads((folder / "said.json").read_text())


@pytest.mark.parametrize(
    ("trap", "message"),
    [
        ("without_deepspeed", "RuntimeError: training would run under {'kind': 'ddp'"),
        ("optimizer_of_deepspeed", "RuntimeError: training would move by"),
        ("flat_slices", "RuntimeError: LoraProAdamW needs whole matrices, and the engine has flattened them"),
        ("empty_group", "RuntimeError: training would move by"),
    ],
)
def test_a_silent_trap_speaks(said, trap, message):
    assert said[trap].startswith(message)
