"""Questions, templates, answers, judgments and scores; FastChat's own viewer must print the numbers we compute."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from fastchat.conversation import conv_templates

from eval.judge import JudgeSettings, Reply
from eval.judge_prompts import FASTCHAT_NAMES, OWN, load_prompts
from eval.mt_bench import (
    FASTCHAT_TEMPERATURES,
    PUBLISHED,
    Answer,
    Question,
    answer_questions,
    conversation,
    fingerprint,
    load_questions,
    read_answers,
    stop_strings,
    write_answers,
)
from eval.mt_bench_scores import Judgment, judge_answers, scores, write_judgments
from lora_ga.errors import SetupError
from tests.eval.judge_stub import JudgeStub, completion

ROOT = os.environ.get("LORA_GA_DATA_ROOT")
needs_data = pytest.mark.skipif(not ROOT, reason="LORA_GA_DATA_ROOT is not set: no real MT-Bench questions here")

QUESTIONS = [
    Question(81, "writing", ("Write {a} poem", "Shorter")),
    Question(111, "math", ("What is 6 x 7?", "And x 2?"), ("It is 42.", "It is 84.")),
    Question(7, "stem", ("Only one turn",)),
]
ANSWERS = [Answer(81, ("A {poem}", "Poem")), Answer(111, ("42", "84")), Answer(7, ("Yes",))]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("LORA_GA_DATA_ROOT", raising=False)


def _settings(url: str, **changes) -> JudgeSettings:
    return JudgeSettings(base_url=url, model="stub", backoff=0.0, **changes)


def _mirror(root: Path, rows: list[dict], references: list[dict] | None = None) -> str:
    folder = root / "mt_bench"
    folder.mkdir()
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if references is not None:
        (folder / "reference_answer").mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in references)
        (folder / "reference_answer" / "gpt-4.jsonl").write_text(lines)
    return str(root)


ROWS = [
    {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": ["not", "this"]},
    {"question_id": 111, "category": "math", "turns": ["c", "d"]},
]
GOLD = [{"question_id": i, "choices": [{"index": 0, "turns": ["e", "f"]}]} for i in (81, 111)]


def test_only_questions_with_one_solution_have_references(tmp_path):
    """FastChat judges writing without one, whatever the files hold."""
    questions = load_questions(_mirror(tmp_path, ROWS, GOLD))
    assert questions == [Question(81, "writing", ("a", "b")), Question(111, "math", ("c", "d"), ("e", "f"))]
    assert load_questions(str(tmp_path), limit=1) == questions[:1]


def test_references_may_be_missing_or_replaced(tmp_path, caplog):
    root = _mirror(tmp_path, ROWS)
    assert load_questions(root)[1].reference == () and "judged without" in caplog.text
    corrected = tmp_path / "corrected.jsonl"
    corrected.write_text(json.dumps({"question_id": 111, "choices": [{"turns": ["g", "h"]}]}))
    assert load_questions(root, references=str(corrected))[1].reference == ("g", "h")


@pytest.mark.parametrize("rows", [[], [{"question_id": 1}], [ROWS[0], ROWS[0]], [{**ROWS[0], "turns": ["a"] * 3}]])
def test_damaged_questions_are_refused(rows, tmp_path):
    with pytest.raises(SetupError, match=r"question\.jsonl"):
        load_questions(_mirror(tmp_path, rows))


def test_a_missing_mirror_and_an_unreachable_hub_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(SetupError, match=r"question\.jsonl is missing"):
        load_questions(str(tmp_path))

    def unreachable(*_, **__):
        raise OSError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(SetupError, match="LORA_GA_DATA_ROOT") as caught:
        load_questions()
    assert "\n" not in str(caught.value)


@pytest.mark.realdata
@needs_data
def test_the_real_questions():
    questions = load_questions(ROOT)
    assert Counter(question.category for question in questions) == dict.fromkeys(FASTCHAT_TEMPERATURES, 10)
    assert all(len(question.turns) == 2 for question in questions) and fingerprint(questions) == PUBLISHED
    referenced = [question for question in questions if question.reference]
    assert Counter(question.category for question in referenced) == {"math": 10, "reasoning": 10, "coding": 10}
    assert all(len(question.reference) == 2 for question in referenced)
    answers = answer_questions(questions, "alpaca", lambda prompts, _: [prompt[-80:] for prompt in prompts], turns=2)
    assert len(answers) == 80 and all(len(answer.turns) == 2 for answer in answers)


@pytest.mark.realdata
@needs_data
def test_fastchat_s_own_prompts_are_read():
    prompts = load_prompts(str(Path(str(ROOT)) / "mt_bench" / "judge_prompts.jsonl"))
    assert {case: prompt.name for case, prompt in prompts.cases.items()} == FASTCHAT_NAMES
    assert prompts.sha256 != OWN.sha256


def test_an_unknown_template_names_near_ones():
    with pytest.raises(SetupError, match="alpaca"):
        conversation("alpacca")
    with pytest.raises(SetupError, match="vicuna"):
        conversation("zzzzzzzz")
    with pytest.raises(SetupError, match="'chatgpt'"):  # known to FastChat, but it makes no prompt
        conversation("chatgpt")


def test_stop_strings_of_every_form():
    assert stop_strings("alpaca") == () and stop_strings("zero_shot") == ("###",)
    assert stop_strings("aquila-chat") == ("###", "</s>", "[UNK]")


def test_second_turns_carry_the_first_answer():
    calls: list[list[str]] = []

    def complete(prompts: list[str], temperature: float | None) -> list[str]:
        assert temperature is None
        calls.append(prompts)
        return [f" answer {len(calls)}.{i} " for i in range(len(prompts))]

    answers = answer_questions(QUESTIONS, "alpaca", complete, turns=2)
    assert answers == [
        Answer(81, ("answer 1.0", "answer 2.0")),
        Answer(111, ("answer 1.1", "answer 2.1")),
        Answer(7, ("answer 1.2",)),
    ]
    assert [len(prompts) for prompts in calls] == [3, 2]
    assert "Write {a} poem" in calls[0][0] and calls[0][0].endswith("### Response:")
    order = [calls[1][1].index(part) for part in ("What is 6 x 7?", "answer 1.1", "And x 2?")]
    assert order == sorted(order) and calls[1][1].endswith("### Response:")
    assert len(answer_questions(QUESTIONS, "alpaca", complete, turns=1)[0].turns) == 1


def test_prompts_are_fastchat_s():
    """The loop of gen_model_answer.py, written out, for every template there is."""
    names = [name for name, template in conv_templates.items() if template.sep_style is not None]
    assert len(names) > 50
    for name in names:
        seen: list[str] = []

        def complete(prompts: list[str], _: float | None, seen: list[str] = seen) -> list[str]:
            seen.extend(prompts)
            return ["done"] * len(prompts)

        answer_questions(QUESTIONS[:1], name, complete, turns=2)
        talk, expected = conversation(name), []
        for turn in QUESTIONS[0].turns:
            talk.append_message(talk.roles[0], turn)
            talk.append_message(talk.roles[1], None)
            expected.append(talk.get_prompt())
            talk.update_last_message("done")
        assert seen == expected


def test_an_answer_ends_at_the_template_s_stop_string():
    def complete(prompts: list[str], _: float | None) -> list[str]:
        return ["said\n### Human: more", "### at once", "nothing to cut"]

    answers = answer_questions(QUESTIONS, "zero_shot", complete, turns=1)
    assert [answer.turns[0] for answer in answers] == ["said", "", "nothing to cut"]


def test_temperatures_by_category_when_wanted():
    seen = {}

    def complete(prompts: list[str], temperature: float | None) -> list[str]:
        seen[temperature] = len(prompts)
        return [f"at {temperature}"] * len(prompts)

    odd = [*QUESTIONS, Question(9, "unheard of", ("x",))]
    answers = answer_questions(odd, "alpaca", complete, turns=1, temperatures=FASTCHAT_TEMPERATURES)
    assert [answer.turns[0] for answer in answers] == ["at 0.7", "at 0.0", "at 0.1", "at 0.7"]
    assert seen == {0.7: 2, 0.0: 1, 0.1: 1}


def test_answer_files_are_fastchat_s_and_deterministic(tmp_path):
    path = write_answers(ANSWERS, tmp_path, "org/model")
    assert path == tmp_path / "model_answer" / "org_model.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [7, 81, 111]
    assert set(rows[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert len({row["answer_id"] for row in rows}) == 3
    assert sorted(read_answers(path), key=lambda a: a.question_id) == sorted(ANSWERS, key=lambda a: a.question_id)
    assert write_answers(ANSWERS[::-1], tmp_path / "again", "org/model").read_bytes() == path.read_bytes()


def test_the_judge_sees_the_right_case(tmp_path):
    with JudgeStub(lambda number, body: (200, completion("[[5]]"))) as stub:
        judged = judge_answers(QUESTIONS, ANSWERS[::-1], _settings(stub.url), cache=tmp_path / "c.jsonl")
    by_case = {(j.question_id, j.turn): j for j in judged.judgments}
    assert set(by_case) == {(81, 1), (111, 1), (7, 1), (81, 2), (111, 2)}
    assert by_case[81, 1].prompt == OWN.cases[1, False] and by_case[111, 2].prompt == OWN.cases[2, True]
    assert "A {poem}" in by_case[81, 1].user_prompt and "It is 42." in by_case[111, 1].user_prompt
    assert all(text in by_case[111, 2].user_prompt for text in ("It is 42.", "It is 84.", "6 x 7", "And x 2?"))
    asked = {(body["messages"][0]["content"], body["messages"][1]["content"]) for body in stub.bodies}
    assert asked == {(j.prompt.system, j.user_prompt) for j in judged.judgments}
    assert judged.details["with_reference"] == 2 and judged.details["reported_models"] == {"stub-0613": 5}
    assert judged.details["prompts_sha256"] == OWN.sha256 and judged.details["unparsed"] == []
    assert "not to be compared" in judged.details["note"] and judged.details["trusted"] is False
    trusted = _settings("http://unused.invalid/v1", trusted=True, replay_only=True)
    assert "note" not in judge_answers(QUESTIONS, ANSWERS, trusted, cache=tmp_path / "c.jsonl").details


def test_a_question_without_an_answer_is_refused(tmp_path):
    with pytest.raises(SetupError, match=r"\[81\]"):
        judge_answers(QUESTIONS, ANSWERS[1:], _settings("http://unused.invalid/v1"), cache=tmp_path / "c.jsonl")


def _judgment(question_id: int, category: str, turn: int, *texts: str) -> Judgment:
    replies = tuple(Reply(text, "m", "stop") for text in texts)
    return Judgment(question_id, category, turn, False, OWN.cases[turn, False], "prompt", replies)


JUDGMENTS = [
    _judgment(81, "writing", 1, "[[3]]", "[[9]]", "[[8]]"),
    _judgment(82, "math", 1, "no", "[[4]]", "[[11]]"),
    _judgment(83, "math", 1, "no", "no", "no"),
    _judgment(81, "writing", 2, "[[1]]", "[[2]]", "[[2]]"),
    _judgment(82, "math", 2, "[[7]]", "[[6]]", "no"),
]


def test_scores_are_means_of_medians_and_count_what_is_missing():
    assert scores(JUDGMENTS) == {
        "first_turn": {"value": 6.0, "n": 2},
        "second_turn": {"value": 4.25, "n": 2},
        "average": {"value": statistics.fmean([8, 4, 2, 6.5]), "n": 4},
        "category_writing": {"value": 5.0, "n": 2},
        "category_math": {"value": 5.25, "n": 2},
        "unparsed_judgments": {"value": 1.0, "n": 5},
        "unparsed_replies": {"value": 6.0, "n": 15},
    }
    assert JUDGMENTS[0].text == "[[8]]" and JUDGMENTS[4].text == "[[7]]"


def test_without_any_rating_there_is_no_mean():
    assert scores(JUDGMENTS[2:3]) == {
        "unparsed_judgments": {"value": 1.0, "n": 1},
        "unparsed_replies": {"value": 3.0, "n": 3},
    }


def _show_result(*arguments: str, cwd: Path) -> list[float]:
    """What FastChat's viewer prints for one model: first turn, second turn, average."""
    command = [sys.executable, "-m", "fastchat.llm_judge.show_result", *arguments]
    printed = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"#+ (.*) #+", printed) == ["First turn", "Second turn", "Average"]
    return [float(number) for number in re.findall(r"^org_model\s.*?(-?[\d.]+)$", printed, flags=re.MULTILINE)]


def test_fastchat_s_viewer_prints_our_means(tmp_path):
    """Garbage included: both leave it out of the means, and only we say so."""
    folder = tmp_path / "data" / "mt_bench"
    path = write_judgments(JUDGMENTS, folder, "org/model", "a-judge")
    ours = [scores(JUDGMENTS)[name]["value"] for name in ("first_turn", "second_turn", "average")]
    assert _show_result("--input-file", str(path), cwd=tmp_path) == pytest.approx(ours)
    assert _show_result("--judge-model", "a-judge", cwd=tmp_path) == pytest.approx(ours)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["score"] for row in rows] == [8.0, 4.0, -1.0, 2.0, 6.5]
    fields = {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert fields <= set(rows[0]) and rows[0]["judge"] == ["a-judge", "own-turn1"]


def test_from_answers_to_the_same_files_twice(tmp_path):
    """The second scoring sends nothing and writes the same bytes."""
    with JudgeStub(
        lambda number, body: (200, completion(f"[[{len(body['messages'][1]['content']) % 10 + 1}]]"))
    ) as stub:
        written = []
        for folder, replay in (("first", False), ("second", True)):
            settings = _settings(stub.url, repeats=3, replay_only=replay)
            judged = judge_answers(QUESTIONS, ANSWERS, settings, cache=tmp_path / "c.jsonl")
            written.append(write_judgments(judged.judgments, tmp_path / folder, "m", settings.judge_id).read_bytes())
    assert written[0] == written[1] and len(stub.bodies) == 15
