"""Proves: prompts render as the protocols say, braces in texts are safe, and every wrong setting is one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_ga.data.glue_files import FORMS
from lora_ga.data.local_recipes import RECIPES
from lora_ga.data.tasks import Example, TaskData, fill, load_task, render
from lora_ga.errors import SetupError

CONF = Path(__file__).resolve().parents[2] / "conf"
LABELS = {**{name: form.labels for name, form in FORMS.items()}, **{name: r.labels for name, r in RECIPES.items()}}
FIELDS = {
    **{name: form.fields for name, form in FORMS.items()},
    "movies": ("sentence",),
    "tone": ("sentence",),
    "acceptability": ("sentence",),
    "compare": ("sentence1", "sentence2"),
    "reply": ("question", "sentence"),
    "pairs": ("sentence1", "sentence2"),
}
IN_WORDS = {
    **dict.fromkeys(("metamath", "metamath_full"), ("query", "response", "reasoning")),
    "code_feedback": ("query", "response", "first_block"),
    **dict.fromkeys(("wizardlm", "alpaca"), ("query", "response")),
    "gsm8k": ("query", "question", "answer", "response", "reasoning"),
    "word_problems": ("query", "question", "answer"),
    "code_tasks": ("query", "response"),
    "dialogue": ("query", "history", "response"),
}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_render_fills_the_fields_and_picks_the_label_word() -> None:
    row = Example({"sentence": "a {brace} and {0}"}, 1)
    assert render("say {sentence}\nresult:", ["no", "yes"], row) == ("say a {brace} and {0}\nresult:", "yes")


@pytest.mark.parametrize("template", ["{text}", "{}", "{sentence", "{sentence.none}"])
def test_render_names_the_fields_there_are(template: str) -> None:
    with pytest.raises(SetupError, match=r"use only \{sentence\}"):
        render(template, ["no", "yes"], Example({"sentence": "a"}, 0))


def test_render_wants_one_word_per_label() -> None:
    row = Example({"sentence": "a"}, 1)
    with pytest.raises(SetupError, match="1 label words"):
        render("{sentence}", ["no"], row)
    with pytest.raises(SetupError, match="a task of 3 labels"):
        render("{sentence}", ["no", "yes"], row, label_count=3)


def test_fingerprint_sees_texts_labels_and_order() -> None:
    one, two = Example({"sentence": "a"}, 0), Example({"sentence": "b"}, 0)

    def mark(*rows: Example) -> str:
        return TaskData("t", ("x", "y"), {"train": rows}, ()).fingerprint("train")

    marks = {mark(one, two), mark(two, one), mark(one), mark(one, Example({"sentence": "b"}, 1))}
    assert len(marks) == 4 and all(len(value) == 16 for value in marks)
    assert mark(one, two) == mark(Example({"sentence": "a"}, 0), two)


@pytest.mark.parametrize("sizes", [{"dev": 3}, {"test": -1}])
def test_wrong_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(SetupError, match="sizes"):
        load_task("local", "movies", sizes=sizes)


def test_unknown_source_is_refused() -> None:
    with pytest.raises(SetupError, match="use local, glue or instructions"):
        load_task("hub", "movies", sizes={})  # type: ignore[arg-type]


@pytest.mark.parametrize("path", sorted((CONF / "protocol").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_protocol_renders_every_task(path: Path) -> None:
    protocol = read(path)
    assert set(protocol) == {"name", "model_revision", "schedule", "answers", "prompts"}
    assert protocol["name"] == path.stem
    assert set(protocol["prompts"]) == set(LABELS) | set(IN_WORDS)
    for name in LABELS:
        prompt = protocol["prompts"][name]
        words = prompt["labels"]
        assert all(isinstance(word, str) for word in words), "yaml reads an unquoted no or true as a boolean"
        assert len(set(words)) == len(LABELS[name])
        for label in range(len(words)):
            row = Example({field: f"the {field}" for field in FIELDS[name]}, label)
            text, target = render(prompt["template"], words, row, label_count=len(LABELS[name]))
            assert all(value in text for value in row.fields.values())
            assert target == words[label] and not text.endswith(" ")


@pytest.mark.parametrize("path", sorted((CONF / "protocol").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("name", IN_WORDS)
def test_every_protocol_asks_every_task_answered_in_words(path: Path, name: str) -> None:
    prompt = read(path)["prompts"][name]
    row = Example({field: f"the {field} {{braces}}" for field in IN_WORDS[name]})
    text, target = fill(prompt["template"], row), fill(prompt["target"], row)
    assert "the query {braces}" in text and target in row.fields.values() and target not in text
    # The local rows come in random order; the authors' shuffle of the others has no effect.
    local = name in ("word_problems", "code_tasks", "dialogue")
    assert prompt["order"] == ("shuffled" if path.stem == "common" and not local else "file")


@pytest.mark.parametrize("name", ["lora_ga", "lora_one", "lora_pro"])
def test_the_papers_decoding_and_targets_are_those_of_their_code(name: str) -> None:
    """reference: section 2 and 3 of the repositories' data.py and eval scripts."""
    protocol = read(CONF / "protocol" / f"{name}.yaml")
    math, code = protocol["answers"]["math"], protocol["answers"]["code"]
    assert math["decoding"]["do_sample"] is (name != "lora_one") is code["decoding"]["do_sample"]
    assert math["decoding"]["max_new_tokens"] == code["decoding"]["max_new_tokens"] == 512
    assert code["decoding"].get("samples", 1) == (5 if name == "lora_ga" else 1)
    assert math["extractor"] == "authors" and code["post_process"] == "authors"
    assert protocol["prompts"]["metamath"]["target"] == ("{response}" if name == "lora_pro" else "{reasoning}")
    assert protocol["prompts"]["metamath"]["template"].startswith("Below is" if name == "lora_pro" else "Q: ")
    schedule = protocol["schedule"]
    assert (schedule["lr_scheduler_type"], schedule["warmup_steps"]) == (
        ("linear", 100) if name == "lora_one" else ("cosine", None)
    )


def test_papers_label_words_follow_the_label_index() -> None:
    for name in ("lora_ga", "lora_one", "lora_pro"):
        prompts = read(CONF / "protocol" / f"{name}.yaml")["prompts"]
        for task in ("mnli", "sst2", "cola", "qnli"):
            assert tuple(prompts[task]["labels"]) == LABELS[task]
        assert prompts["mrpc"]["labels"][1] == "equivalent"


def test_every_task_has_its_config() -> None:
    found = {path.stem: read(path) for path in (CONF / "task").glob("*.yaml") if path.stem in LABELS}
    assert set(found) == set(LABELS)
    for name, config in found.items():
        assert list(config) == ["name", "source", "metric", "sizes", "data_root", "max_length"]
        assert config["name"] == name and config["source"] == ("glue" if name in FORMS else "local")
        assert list(config["sizes"]) == ["train", "validation", "test"]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_local_configs_load(name: str) -> None:
    config = read(CONF / "task" / f"{name}.yaml")
    data = load_task(config["source"], name, sizes=config["sizes"], data_root=config["data_root"])
    assert {split: len(rows) for split, rows in data.splits.items()} == config["sizes"]
    assert data.labels == LABELS[name] and tuple(data.splits["train"][0].fields) == FIELDS[name]
