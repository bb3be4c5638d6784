"""Runs whose answers are words: from configuration to record, scored once or under many protocols, killed and resumed.

A random model of two layers; rows of the local word problems. Its answers are wrong, which is not what is tested.
"""

from __future__ import annotations

import json

import pytest

import experiments.stages
from eval.gsm8k import read_answer
from experiments.config import load_config
from experiments.run import run
from experiments.trained import fingerprint, restore
from lora_ga.errors import SetupError
from lora_ga.records import read_record

SMALL = [
    "model=llama_tiny",
    "task=word_problems",
    "task.sizes={train: 24, validation: 8, test: 8}",
    "train.global_batch_size=4",
    "train.per_device_train_batch_size=4",
    "train.max_steps=4",
    "train.held_out_every=3",
    "train.autocast=null",
    "eval.limit=4",
    "scoring.answers.math.decoding.max_new_tokens=6",
]


@pytest.fixture
def finished(places):
    """finished("method=lora", ...): the record of that run."""

    def execute(*overrides):
        return read_record(run(load_config([*SMALL, *places, *overrides])))

    return execute


@pytest.fixture
def no_training(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("this was trained before")

    return lambda: monkeypatch.setattr(experiments.stages, "train", never)


@pytest.mark.parametrize("method", ["full_ft", "lora", "rslora", "lora_ga", "lora_one", "lora_pro"])
def test_every_method_of_the_math_table_leaves_a_whole_record(finished, method):
    record = finished(f"method={method}")
    assert (record.status, record.error) == ("finished", None)
    for benchmark in ("seen", "new"):
        for metric in ("exact_match", "strict", "flexible", "authors", "parse_failures", "parse_failures_flexible"):
            cell = record.metrics[f"{benchmark}/{metric}"]
            assert cell["n"] == 4 and 0 <= cell["value"] <= 1
        made = record.data["benchmarks"][benchmark]["generation"][0]
        assert (made["found"], made["made"]) == (0, 4) and 0 < made["tokens"] <= 24
    work = [record.data["benchmarks"][benchmark]["generation"][0] for benchmark in ("seen", "new")]
    speed = sum(made["tokens"] for made in work) / sum(made["seconds"] for made in work)
    assert record.cost["generated_tokens_per_second"] == pytest.approx(speed)
    assert record.metrics["held_out_loss"]["n"] == 4
    assert record.step0["held_out_loss"] > 0
    assert [row["step"] for row in record.loss_curve if "held_out_loss" in row] == [3, 4]
    assert record.data["scored"]["split"] == "test" and "majority_rate" not in record.data


def test_held_out_rows_are_those_of_the_split_asked_for(finished):
    test, validation = finished("eval.benchmarks=[]"), finished("eval.benchmarks=[]", "eval.split=validation")
    assert test.data["scored"]["sha256"] != validation.data["scored"]["sha256"]
    assert test.metrics.keys() == {"held_out_loss"}
    assert test.loss_curve[0]["loss"] == validation.loss_curve[0]["loss"]


def test_benchmarks_can_be_chosen_and_an_unknown_one_is_named(finished):
    record = finished("eval.benchmarks=[new]")
    assert "new/strict" in record.metrics and "seen/strict" not in record.metrics
    with pytest.raises(SetupError, match=r"eval.benchmarks names gsm9k, task=word_problems has seen, new"):
        load_config([*SMALL, "eval.benchmarks=[gsm9k]"])


# One training, many scorings


def test_another_protocol_scores_the_same_training(finished, no_training):
    first = finished()
    no_training()
    other = finished("protocol@scoring=lora_one", "scoring.answers.math.decoding.max_new_tokens=6")
    assert (first.protocol, other.protocol) == ("common", "lora_one")
    assert first.run_id != other.run_id and first.protocol_hash != other.protocol_hash
    assert other.loss_curve == first.loss_curve and other.adapters == first.adapters
    assert other.metrics["held_out_loss"] == first.metrics["held_out_loss"]
    assert other.cost["train_seconds"] == first.cost["train_seconds"]
    assert other.data["trained_at_commit"] == first.environment["git_commit"]


def test_another_extractor_makes_no_new_answer(finished):
    finished()
    again = finished("scoring.answers.math.extractor=flexible")
    assert "generated_tokens_per_second" not in again.cost
    for benchmark in ("seen", "new"):
        made = again.data["benchmarks"][benchmark]["generation"][0]
        assert (made["found"], made["made"]) == (4, 0)
        assert again.metrics[f"{benchmark}/exact_match"] == again.metrics[f"{benchmark}/flexible"]


def test_the_same_run_again_trains_nothing_and_scores_the_same(finished, no_training):
    first = finished()
    no_training()
    again = finished()
    assert again.metrics == first.metrics and again.loss_curve == first.loss_curve


def test_a_scoring_cut_short_makes_only_what_is_missing(finished, tmp_path, no_training):
    first = finished()
    for answers in (tmp_path / "outputs" / "generations").glob("*.jsonl"):
        lines = answers.read_text().splitlines(keepends=True)
        answers.write_text("".join(lines[:5]) + lines[5][:20])  # a kill leaves half a line
    no_training()
    again = finished()
    made = [again.data["benchmarks"][name]["generation"][0]["made"] for name in ("seen", "new")]
    assert sum(made) == 3
    assert again.metrics == first.metrics


def test_a_training_is_not_taken_onto_another_start(finished, places, tmp_path):
    finished("method=lora_ga")
    config = load_config([*SMALL, *places, "method=lora_ga"])
    folder = tmp_path / "outputs" / "trained" / config.train_id
    known = json.loads((folder / "trained.json").read_text())
    (folder / "trained.json").write_text(json.dumps({**known, "start": "other"}))
    again = finished("method=lora_ga")
    assert "trained_at_commit" not in again.data  # it was trained anew
    assert json.loads((folder / "trained.json").read_text())["start"] == known["start"]


def test_damaged_weights_are_told_and_never_used(finished, places, tmp_path, tiny):
    finished()
    config = load_config([*SMALL, *places])
    folder = tmp_path / "outputs" / "trained" / config.train_id
    known = json.loads((folder / "trained.json").read_text())
    (folder / "trained.json").write_text(json.dumps({**known, "trained": "0" * 16}))
    with pytest.raises(SystemExit, match="is damaged"):
        finished()


@pytest.mark.parametrize(
    "override",
    [
        "train.learning_rate=3e-4",
        "method.r=4",
        "seeds.data=1",
        "seeds.adapter=1",
        "task.sizes.train=20",
        "protocol=lora_pro",
    ],
)
def test_the_train_id_follows_what_changes_the_weights(override):
    assert load_config([*SMALL, override]).train_id != load_config(SMALL).train_id


@pytest.mark.parametrize(
    "override",
    ["seeds.generation=1", "protocol@scoring=lora_pro", "eval.split=validation", "eval.limit=2", "eval=judged"],
)
def test_the_train_id_does_not_follow_how_it_is_scored(override):
    moved = load_config([*SMALL, override])
    assert moved.train_id == load_config(SMALL).train_id
    assert moved.run_id != load_config(SMALL).run_id


def test_fingerprints_follow_the_trainable_weights(tiny):
    model = tiny("causal")
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    before = fingerprint(model)
    model.model.layers[0].self_attn.k_proj.weight.data += 1
    assert fingerprint(model) == before
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1e-6
    assert fingerprint(model) != before


def test_nothing_kept_is_no_error(tmp_path, tiny):
    assert restore(tmp_path / "none", tiny("causal"), record=None, start="x") is False


# Code that the model writes


def test_programs_do_not_run_without_consent(places):
    with pytest.raises(SetupError, match=r"eval.run_code=true") as caught:
        run(load_config([*SMALL[:1], *places, "task=code_tasks"]))
    assert "\n" not in str(caught.value)


def test_a_missing_engine_is_told_before_anything_loads(places):
    with pytest.raises(SetupError, match="vllm is not installed"):
        run(load_config([*SMALL, *places, "eval.engine=vllm"]))


# Chat without and with a judge


def test_without_a_judge_nothing_is_asked(places):
    small = [s for s in SMALL if not s.startswith(("task", "scoring"))]
    record = read_record(
        run(load_config([*small, *places, "task=dialogue", "task.sizes={train: 24, validation: 8, test: 8}"]))
    )
    assert record.metrics.keys() == {"held_out_loss"}
    assert "judge" in record.data["benchmarks"]["mt_bench"]["not_run"]


def test_gold_answers_through_the_run_score_everything(finished, monkeypatch):
    """The canary of the whole path: what the data calls right is scored right."""
    import experiments.benchmarks
    from eval.decoding import Generation
    from eval.generation import GenerationReport
    from lora_ga.data.word_problems import load_word_problems

    splits, _ = load_word_problems()
    gold = {f"Q: {row.fields['question']}\nA:": row.fields["answer"] for split in splits.values() for row in split}

    def oracle(model, tokenizer, prompts, decoding, **kwargs):
        report = GenerationReport(kwargs["folder"] / "none", 0, len(prompts), 1, 0.0)
        return [[Generation(gold[prompt], "eos", 1)] for prompt in prompts], report

    monkeypatch.setattr(experiments.benchmarks, "generate", oracle)
    record = finished()
    for metric in ("seen/exact_match", "new/exact_match", "seen/flexible", "new/flexible"):
        assert record.metrics[metric]["value"] == 1.0
    assert read_answer(next(iter(gold.values())), next(iter(gold.values())))["strict_correct"]
