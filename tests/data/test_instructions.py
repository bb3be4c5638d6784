"""Proves: each instruction set keeps the rows the papers keep, gives their fields, and names what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pandas
import pytest

from lora_ga.data.instructions import SOURCES, Pool, load_instructions
from lora_ga.data.tasks import Example
from lora_ga.errors import SetupError

Rows = Sequence[Mapping[str, object]]
SAMPLES: Mapping[str, Rows] = {
    "metamath": [
        {"query": "q1", "response": "a\n#### 1\nThe answer is: 1", "type": "GSM_AnsAug", "original_question": "o"},
        {"query": "q2", "response": "b\nThe answer is: 2", "type": "MATH_SV", "original_question": "o"},
        {"query": "q3", "response": "c, no such line", "type": "GSM_FOBAR", "original_question": "o"},
    ],
    "code_feedback": [
        {"query": "q1", "answer": "Say:\n```python\nx\n```\nor\n```\ny\n```", "resource": "r", "lang": "python"},
        {"query": "q2", "answer": "in words only, `x`", "resource": "r", "lang": "python"},
        {"query": "q3", "answer": "open\n```\nz\n", "resource": "r", "lang": "python"},
    ],
    "wizardlm": [
        {"instruction": "i1", "output": "Sure.", "instruction_zh": "一", "output_zh": "抱歉"},
        {"instruction": "i2", "output": "I am SORRY, no.", "instruction_zh": "二", "output_zh": "好"},
        {"instruction": "i3", "output": "As An AI model I cannot.", "instruction_zh": "三", "output_zh": "好"},
        {"instruction": "sorry, as an ai?", "output": "Yes.", "instruction_zh": "四", "output_zh": "好"},
        {"instruction": "i5", "output": "It has an aim.", "instruction_zh": "五", "output_zh": "好"},  # "as an ai" too
    ],
    "alpaca": [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La."},
        {"instruction": "Hum.", "input": None, "output": "Hm."},
    ],
}


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_GA_CACHE", str(tmp_path / "cache"))
    if "realdata" not in request.keywords:
        monkeypatch.delenv("LORA_GA_DATA_ROOT", raising=False)


def lines(root: Path, place: str, rows: Rows) -> Path:
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(root: Path, name: str) -> Pool:
    pools, _ = load_instructions(name, data_root=str(root))
    assert set(pools) == set(SOURCES[name].splits)
    return pools["train"]


def queries(pool: Sequence[Example]) -> list[str]:
    return [row.fields["query"] for row in pool]


def test_metamath_keeps_gsm_rows_and_cuts_only_the_closing_line(tmp_path: Path) -> None:
    lines(tmp_path, "metamath/train.jsonl", SAMPLES["metamath"])
    first, third = train(tmp_path, "metamath")
    assert first.fields == {
        "query": "q1",
        "response": "a\n#### 1\nThe answer is: 1",
        "reasoning": "a\n#### 1",
    }
    assert third.fields["reasoning"] == third.fields["response"] == "c, no such line"
    assert first.label is None


def test_metamath_full_reads_the_same_folder_and_keeps_every_type(tmp_path: Path) -> None:
    lines(tmp_path, "metamath/MetaMathQA-395K.jsonl", SAMPLES["metamath"])
    assert queries(train(tmp_path, "metamath_full")) == ["q1", "q2", "q3"]
    notes = [load_instructions(name, data_root=str(tmp_path))[1] for name in ("metamath", "metamath_full")]
    assert any("2 of 3 train rows" in note and "GSM" in note for note in notes[0])
    assert not any(" of 3 " in note for note in notes[1])


def test_code_feedback_needs_a_fence_and_offers_the_first_block(tmp_path: Path) -> None:
    lines(tmp_path, "code_feedback/train.jsonl", SAMPLES["code_feedback"])
    pool = train(tmp_path, "code_feedback")
    assert queries(pool) == ["q1", "q3"]
    assert pool[0].fields["first_block"] == "Say:\n```python\nx\n```"
    assert pool[0].fields["response"].endswith("y\n```")
    assert pool[1].fields["first_block"] == "open\n```\nz\n```"


def test_wizardlm_drops_refusals_by_the_english_answer_alone(tmp_path: Path) -> None:
    lines(tmp_path, "wizardlm/train.jsonl", SAMPLES["wizardlm"])
    assert [dict(row.fields) for row in train(tmp_path, "wizardlm")] == [
        {"query": "i1", "response": "Sure."},
        {"query": "sorry, as an ai?", "response": "Yes."},
    ]


def test_alpaca_puts_the_input_under_its_own_heading(tmp_path: Path) -> None:
    lines(tmp_path, "alpaca/train.jsonl", SAMPLES["alpaca"])
    assert queries(train(tmp_path, "alpaca")) == ["Add.\n\n### Input:\n1 and 2", "Sing.", "Hum."]


def test_gsm8k_has_two_splits_and_its_annotations_can_go(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24\n2 < 3 << 4\n#### 24"}
    lines(tmp_path, "gsm8k/train.jsonl", [row])
    lines(tmp_path, "gsm8k/test.jsonl", [row, row])
    pools, _ = load_instructions("gsm8k", data_root=str(tmp_path))
    assert [len(pools[split]) for split in ("train", "test")] == [1, 2]
    fields = pools["test"][0].fields
    assert fields["question"] == fields["query"] == "How many?"
    assert fields["answer"] == fields["response"] == row["answer"]
    assert fields["reasoning"] == "48/2 = 24\n2 < 3 << 4\n#### 24"


@pytest.mark.parametrize("form", ["json", "parquet", "shards"])
def test_an_array_and_parquet_give_the_same_rows(tmp_path: Path, form: str) -> None:
    folder, rows = tmp_path / "metamath", list(SAMPLES["metamath"])
    folder.mkdir()
    if form == "json":
        (folder / "MetaMathQA-395K.json").write_text(json.dumps(rows))
    elif form == "parquet":
        pandas.DataFrame(rows).to_parquet(folder / "train.parquet")
    else:
        pandas.DataFrame(rows[:1]).to_parquet(folder / "train-00000-of-00002.parquet")
        pandas.DataFrame(rows[1:]).to_parquet(folder / "train-00001-of-00002.parquet")
    assert queries(train(tmp_path, "metamath")) == ["q1", "q3"]


def test_a_pool_is_a_sequence_of_examples(tmp_path: Path) -> None:
    lines(tmp_path, "alpaca/train.jsonl", SAMPLES["alpaca"])
    pool = train(tmp_path, "alpaca")
    assert pool[:2] == tuple(pool)[:2] == (pool[0], pool[1])
    assert pool[-1] == tuple(pool)[2] and pool[5:] == ()
    with pytest.raises(IndexError):
        pool[3]


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    path = lines(tmp_path, "alpaca/train.jsonl", SAMPLES["alpaca"])
    assert len(train(tmp_path, "alpaca")) == 3
    lines(tmp_path, "alpaca/train.jsonl", SAMPLES["alpaca"][:1])
    os.utime(path, (1, 1))
    assert len(train(tmp_path, "alpaca")) == 1


def test_the_mirror_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(tmp_path, "alpaca/train.jsonl", SAMPLES["alpaca"])
    monkeypatch.setenv("LORA_GA_DATA_ROOT", str(tmp_path))
    assert len(load_instructions("alpaca")[0]["train"]) == 3


def failure(name: str, root: Path | None) -> str:
    with pytest.raises(SetupError) as caught:
        load_instructions(name, data_root=str(root) if root else None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_missing_mirror_folder_is_named(tmp_path: Path, name: str) -> None:
    assert str(tmp_path / SOURCES[name].folder / "train.jsonl") in failure(name, tmp_path)


def test_a_missing_test_file_is_named(tmp_path: Path) -> None:
    lines(tmp_path, "gsm8k/train.jsonl", [{"question": "q", "answer": "a"}])
    assert str(tmp_path / "gsm8k/test.jsonl") in failure("gsm8k", tmp_path)


def test_bad_files_are_one_line_each(tmp_path: Path) -> None:
    path = lines(tmp_path, "alpaca/train.jsonl", [{"instruction": "i", "answer": "o"}])
    assert "no column 'output', only" in failure("alpaca", tmp_path)
    lines(tmp_path, "wizardlm/train.jsonl", [{"instruction": "i", "output": "o"}, {"instruction": "i"}])
    assert "1 rows without output" in failure("wizardlm", tmp_path)
    lines(tmp_path, "metamath/train.jsonl", [{"query": 1, "response": "r", "type": "GSM"}])
    assert "'query' that is not text" in failure("metamath", tmp_path)
    path.write_text('{"instruction": "i", "out')
    assert f"cannot read {path}" in failure("alpaca", tmp_path)
    lines(tmp_path, "alpaca/rows.json", SAMPLES["alpaca"])
    assert "several forms (rows.json, train.jsonl)" in failure("alpaca", tmp_path)
    assert "use one of metamath" in failure("metamaths", tmp_path)


def test_an_unreachable_hub_is_one_line_naming_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = failure("metamath", None)
    assert "LORA_GA_DATA_ROOT" in message and "no route" in message and "metamath/train.jsonl" in message


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_the_hubs_rows_go_the_same_way(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(tmp_path, f"{name}/train.jsonl", SAMPLES[name])
    expected = tuple(train(tmp_path, name))
    asked = []

    def hub(hub_name: str, config: str | None, revision: str) -> datasets.DatasetDict:
        asked.append((hub_name, config, revision))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list([dict(row) for row in SAMPLES[name]])})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    pools, notes = load_instructions(name)
    source = SOURCES[name]
    assert tuple(pools["train"]) == expected and len(expected) > 1
    assert asked == [(source.hub, None, source.revision)]
    assert notes[0].startswith(f"{name}: read from {source.hub}@{source.revision[:8]}")
    assert ("no paper names a revision" in notes[0]) == (name == "wizardlm")


@pytest.mark.realdata
def test_the_real_gsm8k() -> None:
    if not os.environ.get("LORA_GA_DATA_ROOT"):
        pytest.skip("set LORA_GA_DATA_ROOT to a folder with gsm8k/train.jsonl and test.jsonl")
    pools, _ = load_instructions("gsm8k")
    assert (len(pools["train"]), len(pools["test"])) == (7473, 1319)
    shorter = 0
    for row in (*pools["train"], *pools["test"]):
        fields = row.fields
        assert not {"<<", ">>"} & {fields["reasoning"][i : i + 2] for i in range(len(fields["reasoning"]))}
        assert fields["reasoning"].split("\n")[-1] == fields["answer"].split("\n")[-1]
        assert fields["answer"].split("\n")[-1].startswith("#### ")
        shorter += len(fields["reasoning"]) < len(fields["answer"])
    assert shorter > 8000
    assert not {row.fields["query"] for row in pools["train"]} & {row.fields["query"] for row in pools["test"]}
