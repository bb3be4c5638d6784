"""One run from configuration to record, for every method of the tables on a causal model and on T5.

Random models of two layers; rows of the local movie task. What is checked is that a record says what happened.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import experiments.run
import experiments.stages
from eval.base import classification_metrics
from eval.glue import classify
from experiments.config import load_config
from experiments.rows import Rows
from experiments.run import run
from lora_ga.models import load_model
from lora_ga.records import read_record

METHODS = "full_ft lora rslora lora_plus dora pissa adalora lora_ga lora_one lora_pro".split()  # noqa: SIM905
MODELS = ["llama_tiny", "t5_tiny"]
SMALL = [
    "task=movies",
    "task.sizes={train: 64, validation: 32, test: 32}",
    "train.max_steps=4",
    "train.autocast=null",
    "eval.limit=16",
]


@pytest.fixture
def finished(places):
    """finished("method=lora", ...): the record of that run."""

    def execute(*overrides):
        return read_record(run(load_config(["model=llama_tiny", *SMALL, *places, *overrides])))

    return execute


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_whole_record(finished, method, model):
    record = finished(f"model={model}", f"method={method}")

    assert (record.status, record.error) == ("finished", None)
    assert (record.method, record.model, record.task, record.scale) == (method, model, "movies", "local")
    assert [row["step"] for row in record.loss_curve] == [1, 2, 3, 4]
    assert all({"loss", "learning_rate", "grad_norm", "tokens", "seconds"} <= set(row) for row in record.loss_curve)
    assert record.metrics["accuracy"]["n"] == 16 and 0 <= record.metrics["accuracy"]["value"] <= 1
    assert all(cell["n"] == 16 and math.isfinite(cell["value"]) for cell in record.metrics.values())

    promise = "shift" if method == "lora_one" else "identity"
    assert record.step0["promise"] == promise
    difference = record.step0["max_abs_logit_difference"]
    assert (difference > record.step0["tolerance"]) is (promise == "shift")
    if promise == "identity":
        assert record.step0["loss_after"] == pytest.approx(record.step0["loss_before"], rel=1e-4)

    assert len(record.protocol_hash) == 12 and record.config["protocol"]["name"] == "common"
    assert record.data["train"]["n"] == 64 and record.data["scored"]["n"] == 16
    assert all(len(record.data[split]["sha256"]) == 16 for split in ("train", "scored"))
    assert 0.5 <= record.data["majority_rate"] <= 1
    assert record.environment["packages"]["peft"] and record.environment["torch_threads"] >= 1
    assert {"init_seconds", "train_seconds", "eval_seconds", "total_seconds", "peak_memory_mb"} <= set(record.cost)
    assert record.cost["trainable_parameters"] > 0
    assert record.cost["classified_rows_per_second"] > 16 / record.cost["eval_seconds"]  # classification is part of it
    assert bool(record.gradients) is (method in ("lora_ga", "lora_one"))
    assert record.started_at <= record.finished_at


def test_the_file_is_where_the_plan_looks_for_it(places):
    config = load_config(["model=llama_tiny", *SMALL, *places])
    path = run(config)
    assert path.parent == config.records_folder and config.run_id in path.name
    assert [path] == list(config.records_folder.iterdir())  # nothing half written beside it
    assert json.loads(path.read_text())["run_id"] == config.run_id


@pytest.mark.parametrize("method", ["lora", "lora_ga", "lora_pro"])
def test_the_same_seed_gives_the_same_numbers(finished, method):
    chosen = [f"method={method}", "model=t5_tiny"]  # T5 drops out, so its seed matters twice
    first, again, other = finished(*chosen), finished(*chosen), finished(*chosen, "seed=1")

    def losses(record):
        return [row["loss"] for row in record.loss_curve]

    assert losses(first) == losses(again)
    assert losses(first) != losses(other)
    assert first.metrics == again.metrics
    assert first.data["train"]["sha256"] == other.data["train"]["sha256"]  # the seed orders rows, it does not choose


def test_the_gradient_is_read_the_second_time_and_gives_the_same_start(finished):
    first, again = finished("method=lora_ga"), finished("method=lora_ga", "seed=3")
    assert (first.gradients["from_cache"], again.gradients["from_cache"]) == (False, True)
    assert finished("method=lora_ga", "train.gradient.cache=false").gradients["from_cache"] is False
    assert finished("method=lora_ga", "train.gradient.batches=2").gradients["from_cache"] is False
    assert first.gradients["rows_used"] == 32


def test_lora_one_lowers_the_loss_at_its_start(finished):
    record = finished("method=lora_one")
    assert record.step0["loss_after"] < record.step0["loss_before"]


def test_more_budget_lowers_the_loss(finished):
    """Not a claim about a method: the whole path from rows to optimizer does learn."""
    record = finished("method=full_ft", "train.max_steps=20", "train.learning_rate=1e-2")
    assert record.loss_curve[-1]["loss"] < 0.7 * record.loss_curve[0]["loss"]


# When it goes wrong


def failed(overrides):
    with pytest.raises(SystemExit) as caught:
        run(load_config(overrides))
    assert isinstance(caught.value.code, str)  # Python prints it on stderr and ends with code 1
    assert "\n" not in caught.value.code
    return caught.value.code


def only_record(tmp_path):
    (path,) = (tmp_path / "records").rglob("*.json")
    return read_record(path)


def test_a_failing_run_leaves_a_record_that_says_so(places, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(experiments.run, "score", broken)
    message = failed(["model=llama_tiny", *SMALL, *places])
    assert message.startswith("failed: ZeroDivisionError: on purpose")
    record = only_record(tmp_path)
    assert (record.status, record.error) == ("failed", "ZeroDivisionError: on purpose")
    assert len(record.loss_curve) == 4 and record.metrics == {}  # what was learnt before it broke is kept
    assert "on purpose" in capsys.readouterr().err


def test_a_diverging_run_keeps_its_curve(places, tmp_path):
    message = failed(["model=llama_tiny", *SMALL, *places, "train.learning_rate=1e30"])
    assert message.startswith("diverged: ")
    record = only_record(tmp_path)
    assert record.status == "diverged" and 1 <= len(record.loss_curve) < 4


def test_a_false_promise_at_step_0_fails_the_run(places, tmp_path, monkeypatch):
    from lora_ga.methods.lora_one import LoraOne

    monkeypatch.setattr(LoraOne, "step0", "identity")
    assert "promised identity" in failed(["model=llama_tiny", "method=lora_one", *SMALL, *places])
    assert only_record(tmp_path).loss_curve == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_leaves_no_record(places, tmp_path, monkeypatch, interruption):
    def interrupted(*args, **kwargs):
        raise interruption

    monkeypatch.setattr(experiments.stages, "train", interrupted)
    with pytest.raises(interruption):
        run(load_config(["model=llama_tiny", *SMALL, *places]))
    assert not list(tmp_path.rglob("*.json"))


# What it hands out


@pytest.mark.parametrize("method", ["lora_ga", "adalora"])
def test_the_exported_adapter_scores_as_the_record_says(finished, tmp_path, method):
    record = finished(f"method={method}", "export=true", "train.learning_rate=1e-2")
    config = load_config(["model=llama_tiny", *SMALL, f"method={method}"])
    loaded = load_model(config.model)
    model = PeftModel.from_pretrained(loaded.model, tmp_path / "outputs" / record.run_id / "export")
    rows = Rows.load(config)
    prompts = [prompt for prompt, _ in rows.scored]
    settings = {"architecture": "causal", "max_length": config.task.max_length, "batch_size": 32}
    result = classify(model, loaded.tokenizer, prompts, config.prompt.labels, rows.gold, **settings)
    found = classification_metrics(result, rows.gold, 2)
    assert found["accuracy"] == record.metrics["accuracy"]


def test_full_fine_tuning_exports_the_model(finished, tmp_path):
    record = finished("method=full_ft", "export=true", "train.learning_rate=1e-2")
    folder = tmp_path / "outputs" / record.run_id / "export"
    trained = AutoModelForCausalLM.from_pretrained(folder)
    base = load_model(load_config(["model=llama_tiny"]).model).model
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(trained.get_parameter(name), base.get_parameter(name))


@pytest.mark.slow
def test_wandb_offline_gets_a_copy_under_the_run_id(places, finished, tmp_path):
    record = finished("logger=wandb")
    assert record.status == "finished"
    (folder,) = (tmp_path / "outputs" / "wandb").glob("offline-run-*")
    assert folder.name.endswith(record.run_id)
    assert list(folder.glob(f"run-{record.run_id}.wandb"))
