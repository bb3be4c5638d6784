"""Where the runs of a test leave what they make."""

from __future__ import annotations

import pytest

import experiments.stages
import lora_ga.data.encoding


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Records, outputs and caches in a folder of this test (the assets stay where they are)."""
    monkeypatch.setattr(lora_ga.data.encoding, "cache_folder", (tmp_path / "cache").joinpath)
    monkeypatch.setattr(experiments.stages, "cache_folder", (tmp_path / "cache").joinpath)
    return [f"records={tmp_path}/records", f"outputs={tmp_path}/outputs"]
