"""Proves: code rows parse, keep their program, are short, and no task or solution is there twice."""

from __future__ import annotations

import ast
import gzip
import itertools
import json
import warnings

import pytest

from lora_ga.data import code_tasks
from lora_ga.data.assets import asset
from lora_ga.data.code_tasks import load_code_tasks, plain
from lora_ga.data.cutting import Splits, pieces
from lora_ga.data.local_recipes import normalise
from lora_ga.data.tasks import Example, TaskData
from lora_ga.errors import SetupError

# Of the first 64 rows: a changed one means that new numbers are no longer comparable with committed ones.
FINGERPRINTS = {
    "train": "277deba7a89b5f06",
    "validation": "aa468c799c1879c3",
    "test": "09da7f0aa1470321",
}


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_code_tasks()[0]


@pytest.fixture(scope="module")
def rows(splits: Splits) -> tuple[Example, ...]:
    return tuple(row for found in splits.values() for row in found)


def solution(response: str) -> str:
    opening, code, closing = response.split("```")
    assert opening == closing == "" and code.startswith("python\n")
    return code.removeprefix("python\n")


def test_there_are_enough_rows(splits: Splits) -> None:
    assert len(splits["train"]) >= 1000 and len(splits["validation"]) >= 128 and len(splits["test"]) >= 64


def test_responses_are_one_fence_of_python_with_the_function_asked_for(rows: tuple[Example, ...]) -> None:
    for row in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(solution(row.fields["response"]))
        assert "main_solution" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert row.fields["query"].startswith(code_tasks.INSTRUCTION)
        assert row.fields["task"] in row.fields["query"] and row.fields["io"] in row.fields["query"]


def test_no_task_and_no_solution_is_there_twice_or_nearly(rows: tuple[Example, ...], splits: Splits) -> None:
    assert len({normalise(row.fields["response"]) for row in rows}) == len(rows)
    words = {
        split: [frozenset(normalise(row.fields["task"]).split()) for row in found] for split, found in splits.items()
    }
    assert len(set(itertools.chain.from_iterable(words.values()))) == len(rows)
    for one, two in itertools.product(words["train"], words["validation"] + words["test"]):
        assert len(one & two) <= code_tasks.ALIKE * len(one | two)


def test_rows_are_short_and_in_ascii(rows: tuple[Example, ...]) -> None:
    for row in rows:
        text = row.fields["query"] + "\n" + row.fields["response"]
        assert text.isascii() and pieces(text) <= code_tasks.MAX_PIECES and row.label is None


def test_solutions_are_the_sets_own(splits: Splits) -> None:
    with gzip.open(asset("codeio"), "rt", encoding="utf-8") as lines:
        raw = {row["task_description"].strip(): row["code_sample"] for row in map(json.loads, lines)}
    for row in splits["test"]:
        assert solution(row.fields["response"]) == plain(raw[row.fields["task"]]) + "\n"


def test_plain_code_does_the_same_without_comments_and_docstrings() -> None:
    code = '''
"""About the file."""
import math  # needed

class Empty:
    """Nothing in it."""

def main_solution(x):
    """About it."""
    # a comment
    text = "# not a comment"
    return [math.floor(x), text]
'''
    cleaned = plain(code)
    assert "About" not in cleaned and "a comment\n" not in cleaned and "needed" not in cleaned
    assert "Nothing in it" not in cleaned
    space: dict[str, object] = {}
    exec(cleaned, space)
    assert space["main_solution"](2.5) == [2, "# not a comment"]  # type: ignore[operator]
    assert plain(cleaned) == cleaned


def raw(**changes: str) -> dict[str, str]:
    row = {
        "task_description": "Given `x`, double it.",
        "input_output_spec": "Input:\n  `x` (int): A number.\n\nOutput:\n  `return` (int): Twice the number.",
        "code_sample": "def main_solution(x):\n    return 2 * x",
    }
    return row | changes


def test_only_short_plain_rows_that_parse_are_kept() -> None:
    kept = code_tasks._row(raw(), 100)
    assert kept is not None and "\n\nOutput" not in kept.fields["io"]
    length = pieces(kept.fields["query"] + "\n" + kept.fields["response"])
    assert code_tasks._row(raw(), length) == kept
    assert code_tasks._row(raw(), length - 1) is None
    assert code_tasks._row(raw(code_sample="def main_solution(x) return x"), 100) is None
    assert code_tasks._row(raw(code_sample="def main_solution(x):\n    return '```'"), 100) is None
    assert code_tasks._row(raw(task_description="Doublé"), 100) is None
    assert code_tasks._row(raw(code_sample="#" * code_tasks.MAX_CHARACTERS + "\nx = 1"), 100) is None


def test_warnings_as_errors_change_no_row() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plain(r"x = '\d'") == r"x = '\\d'"


def test_same_rows_from_scratch_and_the_committed_ones(splits: Splits) -> None:
    code_tasks._splits.cache_clear()
    data = TaskData("code_tasks", (), load_code_tasks(dict.fromkeys(splits, 64))[0], ())
    assert all(data.splits[split] == splits[split][:64] for split in splits)
    assert {split: data.fingerprint(split) for split in splits} == FINGERPRINTS


def test_asking_for_too_much_names_the_maximum(splits: Splits) -> None:
    most = len(splits["train"])
    with pytest.raises(SetupError, match=f"code_tasks has {most} train rows, not {most + 1}: set sizes.train"):
        load_code_tasks({"train": most + 1})
