"""Proves: held-out templates stay out, no numbers serve twice, answers add up, every prefix is balanced."""

from __future__ import annotations

import re
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_ga.data import word_problems
from lora_ga.data.cutting import Splits, pieces
from lora_ga.data.local_recipes import normalise
from lora_ga.data.tasks import Example, TaskData
from lora_ga.data.word_problems import load_word_problems
from lora_ga.errors import SetupError

# Of the first 256 rows: a changed one means that new numbers are no longer comparable with committed ones.
FINGERPRINTS = {
    "train": "8cd59f83af3bb94c",
    "validation": "c1b270f5f9d7e104",
    "test": "fdfc4201d72500d7",
    "new": "65251309c47aecb8",
}


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_word_problems()[0]


def templates(splits: Splits, split: str) -> set[str]:
    return {row.fields["template"] for row in splits[split]}


def numbers(row: Example) -> tuple[str, ...]:
    return (row.fields["template"], *re.findall(r"\d+(?:\.\d+)?", row.fields["question"]))


def test_held_out_templates_are_in_new_alone(splits: Splits) -> None:
    assert templates(splits, "train") == templates(splits, "validation") == templates(splits, "test")
    assert not templates(splits, "train") & templates(splits, "new")
    assert len(templates(splits, "train")) >= 50 and len(templates(splits, "new")) >= 10
    note = load_word_problems({"new": 1})[1][0]
    assert f"the {len(templates(splits, 'train'))} trained" in note, (
        "the note is of the task, not of the rows asked for"
    )
    assert f"new {len(templates(splits, 'new'))} never" in note


def test_only_templates_that_their_authors_checked(splits: Splits) -> None:
    checked = {str(number) for number in word_problems._checked()}
    assert len(checked) == 85 and "32" not in checked  # 32 is in the file's list of templates to fix
    assert templates(splits, "train") | templates(splits, "new") < checked


def test_there_are_enough_rows(splits: Splits) -> None:
    assert len(splits["train"]) >= 2000
    assert all(len(splits[split]) >= 256 for split in ("validation", "test", "new"))


def test_no_question_and_no_numbers_of_a_template_serve_twice(splits: Splits) -> None:
    rows = [row for split in splits.values() for row in split]
    assert len({normalise(row.fields["question"]) for row in rows}) == len(rows)
    assert len({numbers(row) for row in rows}) == len(rows)


def test_every_prefix_is_balanced_over_templates(splits: Splits) -> None:
    for split, rows in splits.items():
        all_of = len(templates(splits, split))
        for length in (all_of, 7 * all_of // 2, 256, len(rows)):
            counts = Counter(row.fields["template"] for row in rows[:length])
            assert max(counts.values()) - min(counts.values()) <= (length % all_of > 0)
            assert len(counts) == min(length, all_of)


def test_order_repeats_no_pattern(splits: Splits) -> None:
    of = len(templates(splits, "train"))
    names = [row.fields["template"] for row in splits["train"]]
    assert names[:of] != names[of : 2 * of]


def test_rows_are_short_and_whole(splits: Splits) -> None:
    for rows in splits.values():
        for row in rows:
            assert set(row.fields) == {"question", "answer", "query", "template"} and row.label is None
            assert row.fields["query"] == row.fields["question"] == row.fields["question"].strip() != ""
            assert pieces(row.fields["question"] + "\n" + row.fields["answer"]) <= word_problems.MAX_PIECES


def test_answers_end_in_a_whole_number_that_their_steps_reach(splits: Splits) -> None:
    reached = checked = 0
    for row in (row for rows in splits.values() for row in rows):
        steps, gold = re.fullmatch(r"(.+)\n#### (\d+)", row.fields["answer"], re.DOTALL).groups()  # type: ignore[union-attr]
        reached += re.search(rf"(?<![\d.]){gold}(?![\d]|\.[1-9])", steps.replace(",", "")) is not None
        for left, right in re.findall(r"^(?:[A-Z][a-z' ]+)?(\d+(?: ?[-+*/] ?\d+)+) ?= ?(\d+(?:\.\d+)?)\b", steps, re.M):
            checked += 1
            assert abs(eval(left) - float(right)) < 0.01, row.fields["answer"]
    assert reached == sum(map(len, splits.values())) and checked > 100


def test_same_rows_from_scratch_and_the_committed_ones(splits: Splits) -> None:
    word_problems._splits.cache_clear()
    data = TaskData("word_problems", (), load_word_problems(dict.fromkeys(splits, 256))[0], ())
    assert all(data.splits[split] == splits[split][:256] for split in splits)
    assert {split: data.fingerprint(split) for split in splits} == FINGERPRINTS


def test_the_limit_on_length_moves_no_template_between_sides(splits: Splits) -> None:
    shorter, _ = load_word_problems(max_pieces=110)
    for split, rows in shorter.items():
        found = {row.fields["template"] for row in rows}
        assert found and found < templates(splits, split)
        assert all(pieces(row.fields["question"] + "\n" + row.fields["answer"]) <= 110 for row in rows)


def test_asking_for_too_much_names_the_maximum(splits: Splits) -> None:
    most = len(splits["new"])
    with pytest.raises(SetupError, match=f"word_problems has {most} new rows, not {most + 1}: set sizes.new"):
        load_word_problems({"new": most + 1})


@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 99)), max_size=5), st.integers(0, 999))
def test_a_sum_has_the_value_python_gives_it(rest: list[tuple[str, int]], first: int) -> None:
    expression = f"{first}" + "".join(f" {sign} {number}" for sign, number in rest)
    assert word_problems._value(expression) == pytest.approx(eval(expression))


def test_a_sum_may_hold_money_and_other_signs() -> None:
    assert word_problems._value("$1,200 x 3 ÷ £4") == 900


def made(answer: str, gold: str = "6") -> tuple[str, str, dict[str, Any]]:
    return "How many?", answer, {"answer": gold, "metadata": {"answer_value": gold}}


def test_rows_that_do_not_add_up_are_refused() -> None:
    assert word_problems._sound(*made("2 * 3 = 6\n#### 6"))
    assert not word_problems._sound(*made("2 * 4 = 6\n#### 6"))
    assert not word_problems._sound(*made("13 / 2 = 6\n#### 6")), "cut to a whole number"
    assert not word_problems._sound(*made("2 * 3 = 6\n#### 6", gold="7")), "not the generator's answer"
    assert not word_problems._sound(*made("2 * 3 = 6\n#### 6.0"))
    assert not word_problems._sound(*made("0.6666666 * 9 = 6\n#### 6"))
    assert word_problems._sound(*made("She pays 5 kg * 2 - 4 = 6 kg\n#### 6")), "words in between: not a plain sum"


@pytest.mark.parametrize("fails", [False, True])
def test_loading_the_generators_leaves_the_modules_as_they_were(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    mine = ModuleType("reasoning_gym")
    monkeypatch.setitem(sys.modules, "reasoning_gym", mine)
    monkeypatch.delitem(sys.modules, "reasoning_gym.utils", raising=False)
    path = list(sys.path)
    if fails:
        run = word_problems._run
        broken = {"gsm_symbolic_50_99": 1}
        monkeypatch.setattr(word_problems, "_run", lambda name: 1 // 0 if name in broken else run(name))
        with pytest.raises(ZeroDivisionError):
            word_problems._modules()
    else:
        assert all(any(name.startswith("generate_") for name in vars(module)) for module in word_problems._modules())
    assert sys.modules["reasoning_gym"] is mine and "reasoning_gym.utils" not in sys.modules
    assert sys.path == path
