"""Proves: splits by hash cover every key once in the shares asked for, and wrong sizes are refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_ga.data.cutting import assign, by_hash, first_rows, pieces
from lora_ga.data.tasks import Example
from lora_ga.errors import SetupError

SHARES = {"train": 0.82, "validation": 0.11, "test": 0.07}
ROWS = {"train": tuple(Example({"query": str(number)}) for number in range(5)), "test": (Example({"query": "last"}),)}


@given(st.sets(st.text(max_size=6), max_size=60))
def test_every_key_has_one_place_and_the_shares_hold(keys: set[str]) -> None:
    places = assign("task", keys, SHARES)
    assert set(places) == keys
    for split, share in SHARES.items():
        assert abs(list(places.values()).count(split) - share * len(keys)) <= 1


@given(st.lists(st.text(max_size=6), max_size=30), st.randoms(use_true_random=False))
def test_order_hangs_on_keys_and_name_alone(keys: list[str], random: object) -> None:
    shuffled = list(keys)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert by_hash("task", keys) == by_hash("task", shuffled)
    assert sorted(by_hash("task", keys)) == sorted(set(keys))


def test_another_task_has_another_order() -> None:
    keys = [str(number) for number in range(40)]
    assert by_hash("one", keys) != by_hash("two", keys)


def test_pieces_are_words_digits_marks_and_line_ends() -> None:
    assert pieces("") == 0
    assert pieces("She paid $12.50,\nor so.") == len(["She", "paid", *"$12.50", ",", "\n", "or", "so", "."])
    assert pieces("main_solution") == 3


def test_first_rows_are_prefixes_and_absent_means_all() -> None:
    assert first_rows("task", ROWS, None) == ROWS
    cut = first_rows("task", ROWS, {"train": 2, "test": None})
    assert cut == {"train": ROWS["train"][:2], "test": ROWS["test"]}
    assert first_rows("task", ROWS, {"train": 0})["train"] == ()


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ({"train": 6}, "task has 5 train rows, not 6: set sizes.train to 0..5"),
        ({"test": -1}, "not -1: set sizes.test to 0..1"),
        ({"dev": 1}, "unknown split 'dev' of task task: use train, test"),
    ],
)
def test_wrong_sizes_name_what_there_is(sizes: dict[str, int | None], advice: str) -> None:
    with pytest.raises(SetupError, match=advice):
        first_rows("task", ROWS, sizes)
