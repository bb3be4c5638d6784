"""Proves: the rows a protocol chooses are those a plain reading of its rule gives; none is train and validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_ga.data.selection import BATCH, Pair, RowRule, Selection, select_rows
from lora_ga.data.tasks import Example
from lora_ga.errors import SetupError

LIMIT = 8
FILE, SHUFFLED = RowRule("file", LIMIT), RowRule("shuffled", LIMIT)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    inner = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


WORDS = word_tokenizer()


def source(lengths: Sequence[int], name: str = "q") -> tuple[Example, ...]:
    """Rows whose prompt and target have these many words together."""
    return tuple(
        Example({"q": f"{name}{index}", "a": " ".join(["w"] * (length - 1))}) for index, length in enumerate(lengths)
    )


def render(row: Example) -> Pair:
    return row.fields["q"], row.fields["a"]


def select(splits: dict[str, Sequence[Example]], rule: RowRule, sizes: dict[str, int | None], **more: int) -> Selection:
    return select_rows(splits, render=render, rule=rule, sizes=sizes, tokenizer=WORDS, **more)


def short(rows: Sequence[Example]) -> list[Pair]:
    """The rule said plainly: fewer words than the limit."""
    return [render(row) for row in rows if len(f"{row.fields['q']} {row.fields['a']}".split()) < LIMIT]


lengths = st.lists(st.integers(2, 2 * LIMIT - 2), max_size=60)
counts = st.integers(0, 30)


@settings(deadline=None)
@given(lengths, counts, counts)
def test_file_order_takes_the_first_rows_then_the_next(found: list[int], train: int, held: int) -> None:
    rows = source(found)
    passing = short(rows)
    if len(passing) < train + held:
        with pytest.raises(SetupError, match=f"{len(passing)} rows pass, not {train} for train and {held} for"):
            select({"train": rows}, FILE, {"train": train, "validation": held})
        return
    chosen = select({"train": rows}, FILE, {"train": train, "validation": held})
    assert chosen.splits == {"train": passing[:train], "validation": passing[train : train + held]}
    read = chosen.report["read"]["train"]
    assert read["seen"] - read["too_long"] == train + held and read["rows"] == len(rows)


@settings(deadline=None)
@given(lengths, counts, counts, st.integers(0, 3))
def test_shuffled_rows_are_a_fixed_permutation_without_leaks(
    found: list[int], train: int, held: int, seed: int
) -> None:
    rows = source(found)
    train, held = min(train, len(short(rows))), min(held, max(0, len(short(rows)) - train))
    sizes: dict[str, int | None] = {"train": train, "validation": held}
    chosen = select({"train": rows}, SHUFFLED, sizes, seed=seed)
    assert chosen == select({"train": rows}, SHUFFLED, sizes, seed=seed)
    both = chosen.splits["train"] + chosen.splits["validation"]
    assert len(set(both)) == len(both) == train + held
    assert set(both) <= set(short(rows))


@settings(deadline=None)
@given(lengths, st.sampled_from([FILE, SHUFFLED]))
def test_null_sizes_use_every_row_once(found: list[int], rule: RowRule) -> None:
    rows = source(found)
    passing = short(rows)
    held = len(passing) // 3
    ordered = select({"train": rows}, rule, {"train": None, "validation": 0}).splits["train"]
    assert sorted(ordered) == sorted(passing)
    last = select({"train": rows}, rule, {"train": None, "validation": held}).splits
    assert last == {"train": ordered[: len(ordered) - held], "validation": ordered[len(ordered) - held :]}
    rest = select({"train": rows}, rule, {"train": held, "validation": None}).splits
    assert rest == {"train": ordered[:held], "validation": ordered[held:]}


def test_the_shuffle_is_the_one_the_authors_meant() -> None:
    rows = source([3] * 50)
    meant = datasets.Dataset.from_list([dict(row.fields) for row in rows]).shuffle(seed=42)["q"]
    chosen = select({"train": rows}, RowRule("shuffled", None), {"train": None})
    assert [prompt for prompt, _ in chosen.splits["train"]] == list(meant) != [row.fields["q"] for row in rows]
    assert chosen.report["shuffle_seed"] == 42
    assert select({"train": rows}, FILE, {"train": None}).report["shuffle_seed"] is None
    other = select({"train": rows}, SHUFFLED, {"train": None}, seed=1)
    assert other.splits["train"] != chosen.splits["train"]


def test_the_limit_is_strict_and_counts_special_tokens() -> None:
    rows = source([LIMIT - 1, LIMIT, LIMIT + 1])
    chosen = select({"train": rows}, FILE, {"train": None})
    assert chosen.splits["train"] == [render(rows[0])]
    assert chosen.report["read"]["train"] == {"rows": 3, "seen": 3, "too_long": 2}
    started = word_tokenizer()
    started.backend_tokenizer.post_processor = processors.TemplateProcessing(single="? $A", special_tokens=[("?", 0)])
    sizes = {"train": None}
    assert not select_rows({"train": rows}, render=render, rule=FILE, sizes=sizes, tokenizer=started).splits["train"]


def test_without_a_limit_every_length_passes() -> None:
    rows = source([3, 3000])
    assert len(select({"train": rows}, RowRule("file", None), {"train": 2}).splits["train"]) == 2


class Counted(Sequence[Example]):
    """Rows that note which were read."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self.rows, self.read = rows, set[int]()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        self.read.add(index)
        return self.rows[index]

    def __iter__(self) -> Iterator[Example]:
        raise AssertionError("the whole source was read")


@pytest.mark.parametrize("rule", [FILE, SHUFFLED])
def test_no_more_is_read_than_needed(rule: RowRule) -> None:
    rows = Counted(source([3, LIMIT + 1] * 5000))
    chosen = select({"train": rows}, rule, {"train": 1200, "validation": 300})
    assert [len(chosen.splits[split]) for split in ("train", "validation")] == [1200, 300]
    read = chosen.report["read"]["train"]
    assert read["seen"] <= len(rows.read) < read["seen"] + BATCH and read["seen"] < 4000


@settings(max_examples=30, deadline=None)
@given(lengths, lengths, st.sampled_from([FILE, SHUFFLED]))
def test_own_validation_rows_are_filtered_but_test_rows_are_left_alone(
    train: list[int], held: list[int], rule: RowRule
) -> None:
    splits = {"train": source(train), "validation": source(held, "v"), "test": source(train, "t")}
    chosen = select(splits, rule, {"train": None, "validation": None, "test": len(train)})
    for split in ("train", "validation"):
        assert sorted(chosen.splits[split]) == sorted(short(splits[split]))
    assert chosen.splits["test"] == [render(row) for row in splits["test"]]
    cut = select(splits, rule, {"train": 0, "validation": len(short(splits["validation"])) // 2, "test": 0})
    assert cut.splits["validation"] == chosen.splits["validation"][: len(chosen.splits["validation"]) // 2]
    assert cut.splits["train"] == cut.splits["test"] == []


def test_absent_sizes_mean_all_and_no_validation_cut_from_train() -> None:
    chosen = select({"train": source([3, 4]), "new": source([50], "n")}, FILE, {})
    assert [len(rows) for rows in chosen.splits.values()] == [2, 0, 1]


def test_prompts_held_out_and_trained_on_are_counted() -> None:
    rows = (*source([3, 4]), *source([5, 6]), *source([3], "x"))
    chosen = select({"train": rows}, FILE, {"train": 3, "validation": 2})
    assert chosen.report["validation_prompts_in_train"] == 1


@pytest.mark.parametrize(
    ("splits", "sizes", "message"),
    [
        (("train",), {"train": 9}, "4 rows pass, not 9 for train"),
        (("train",), {"train": None, "validation": 5}, "4 rows pass, not 0 for train and 5 for validation"),
        (("train",), {"train": None, "validation": None}, "both null"),
        (("train",), {"train": -1}, "sizes.train is negative"),
        (("train",), {"train": 1, "test": 2}, "no test rows: set sizes.test to 0"),
        (("train", "validation"), {"train": 1, "validation": 5}, "4 validation rows pass, not 5"),
        (("train", "test"), {"train": 1, "test": 6}, "5 test rows pass, not 6"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(splits: tuple[str, ...], sizes: dict[str, int | None], message: str) -> None:
    rows = source([3, 4, 99, 5, 6])
    with pytest.raises(SetupError, match=message) as caught:
        select({split: rows for split in splits}, FILE, sizes)
    assert "\n" not in str(caught.value)
