"""Proves that the real GLUE files train and evaluate: TSV mirror to record, causal and T5, on tiny random models."""

import os
from pathlib import Path

import pytest

from experiments.config import load_config
from experiments.run import run
from lora_ga.records import read_record

ROOT = os.environ.get("LORA_GA_DATA_ROOT")
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not ROOT, reason="LORA_GA_DATA_ROOT is not set: no real GLUE files here"),
]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cola", "mrpc", "sst2", "qnli"])
@pytest.mark.parametrize(("model", "protocol"), [("llama_tiny", "lora_ga"), ("t5_tiny", "lora_pro")])
def test_real_rows_train_and_score(task: str, model: str, protocol: str, tmp_path: Path) -> None:
    config = load_config(
        [f"task={task}", f"model={model}", f"protocol={protocol}", "method=lora_ga", "train.max_steps=3",
         "eval.limit=24", f"records={tmp_path}", f"outputs={tmp_path}/out"]
    )  # fmt: skip
    record = read_record(run(config))
    assert record.status == "finished"
    assert record.metrics["accuracy"]["n"] == 24
    assert record.data["train"]["n"] > 3000
    if task == "qnli":
        assert any("no train file" in note and "60/20/20" in note for note in record.data["notes"]), record.data[
            "notes"
        ]
