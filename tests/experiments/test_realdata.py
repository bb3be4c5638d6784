"""Proves that real files train and evaluate: GLUE on tiny random models, causal and T5; GSM8K on SmolLM2."""

import os
from pathlib import Path

import pytest

from experiments.config import load_config
from experiments.run import run
from lora_ga.records import read_record

ROOT = os.environ.get("LORA_GA_DATA_ROOT")
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not ROOT, reason="LORA_GA_DATA_ROOT is not set: no real files here"),
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


PROTOCOLS = ["common", "lora_ga", "lora_one", "lora_pro"]


@pytest.mark.slow
def test_real_gsm8k_trains_once_and_is_scored_under_every_protocol(tmp_path: Path) -> None:
    """SmolLM2 on the real train file, two rows of the real test file, answers cut short for time."""
    trained, found = set(), {}
    for protocol in PROTOCOLS:
        config = load_config(
            ["task=gsm8k", "method=lora", f"protocol@scoring={protocol}", "task.sizes={train: 24, validation: 4}",
             "task.max_tokens=160", "train.max_steps=2", "train.global_batch_size=4", "train.held_out_every=null",
             "train.per_device_train_batch_size=4", "eval.limit=2", "scoring.answers.math.decoding.max_new_tokens=24",
             f"records={tmp_path}", f"outputs={tmp_path}/out"]
        )  # fmt: skip
        record = read_record(run(config))
        assert (record.status, record.protocol) == ("finished", protocol)
        assert record.data["selection"]["read"]["train"]["rows"] == 7473
        found[protocol] = {name: cell["n"] for name, cell in record.metrics.items()}
        trained.add(str(record.loss_curve))
    assert len(trained) == 1 and len(list((tmp_path / "out" / "trained").iterdir())) == 1
    assert all(sizes["gsm8k/exact_match"] == 2 and sizes["held_out_loss"] == 2 for sizes in found.values())
