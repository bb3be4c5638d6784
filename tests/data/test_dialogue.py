"""Proves: dialogue rows follow each other in the data, a conversation lies in one split, no answer serves twice."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from lora_ga.data import dialogue
from lora_ga.data.assets import asset
from lora_ga.data.cutting import Splits, pieces
from lora_ga.data.dialogue import load_dialogue
from lora_ga.data.local_recipes import normalise
from lora_ga.data.tasks import Example, TaskData
from lora_ga.errors import SetupError

# Of the first 256 rows: a changed one means that new numbers are no longer comparable with committed ones.
FINGERPRINTS = {
    "train": "eeeb5dea44984c83",
    "validation": "4cdefb62666936b6",
    "test": "ab2e5faaf3cd465c",
}


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_dialogue()[0]


@pytest.fixture(scope="module")
def rows(splits: Splits) -> tuple[Example, ...]:
    return tuple(row for found in splits.values() for row in found)


def test_there_are_enough_rows(splits: Splits) -> None:
    assert len(splits["train"]) >= 4000 and len(splits["validation"]) >= 500 and len(splits["test"]) >= 500


def test_a_conversation_lies_in_one_split_and_gives_few_rows(rows: tuple[Example, ...], splits: Splits) -> None:
    places = {split: {row.fields["conversation"] for row in rows} for split, rows in splits.items()}
    assert sum(map(len, places.values())) == len(set().union(*places.values()))
    assert max(Counter(row.fields["conversation"] for row in rows).values()) == dialogue.PER_CONVERSATION


def test_no_answer_serves_twice_in_a_split_or_in_two(rows: tuple[Example, ...]) -> None:
    assert len({normalise(row.fields["response"]) for row in rows}) == len(rows)


def test_turns_follow_each_other_and_speakers_alternate(splits: Splits) -> None:
    conversations = json.loads(asset("chitchat").read_text(encoding="utf-8"))
    for row in splits["test"]:
        messages = conversations[row.fields["conversation"]]["messages"]
        turns = [" ".join(" ".join(part["text"] for part in turn).split()) for turn in messages]
        marked = [line.split(": ", 1) for line in row.fields["history"].split("\n")]
        ours = [*(text for _, text in marked), row.fields["query"], row.fields["response"]]
        starts = [start for start in range(len(turns)) if turns[start : start + len(ours)] == ours]
        assert starts, "not a stretch of the conversation"
        senders = [messages[starts[0] + offset][0]["sender"] for offset in range(len(ours))]
        speakers = [*(speaker for speaker, _ in marked), "User", "Assistant"]
        assert {(speaker, sender == senders[-1]) for speaker, sender in zip(speakers, senders, strict=True)} <= {
            ("Assistant", True),
            ("User", False),
        }


def test_rows_are_short_and_hold_no_address(rows: tuple[Example, ...]) -> None:
    for row in rows:
        text = "\n".join(row.fields[name] for name in ("history", "query", "response"))
        assert text.isascii() and not re.search(r"http|www\.|@|<", text)
        assert len(row.fields["response"].split()) in dialogue.WORDS
        assert len(row.fields["query"].split()) >= dialogue.QUERY_WORDS
        assert all(line.startswith(("User: ", "Assistant: ")) for line in row.fields["history"].split("\n"))
        assert row.label is None


def test_what_a_usable_turn_needs() -> None:
    turns = ["hi there", "hello you", "how is it going", "very well thank you"]
    assert dialogue._usable(turns, 3, 70) and dialogue._usable(turns, 2, 70)
    assert not dialogue._usable(turns, 1, 70), "nothing before the query"
    assert not dialogue._usable([*turns[:3], "well thank you"], 3, 70)
    assert not dialogue._usable([*turns[:2], "how?", turns[3]], 3, 70)
    assert not dialogue._usable([*turns[:3], "look at www.example.org please now"], 3, 70)
    assert not dialogue._usable(["olé", *turns[1:]], 3, 70)
    length = pieces("\n".join(turns))
    assert dialogue._usable(turns, 3, length) and not dialogue._usable(turns, 3, length - 1)


def test_history_is_the_two_turns_before_the_query_where_there_are_two() -> None:
    turns = ["a b", "c d", "e f", "g h", "i j"]
    assert dialogue._row("x", turns, 4).fields["history"] == "User: c d\nAssistant: e f"
    assert dialogue._row("x", turns, 2).fields["history"] == "Assistant: a b"


def test_same_rows_from_scratch_and_the_committed_ones(splits: Splits) -> None:
    dialogue._splits.cache_clear()
    data = TaskData("dialogue", (), load_dialogue(dict.fromkeys(splits, 256))[0], ())
    assert all(data.splits[split] == splits[split][:256] for split in splits)
    assert {split: data.fingerprint(split) for split in splits} == FINGERPRINTS


def test_asking_for_too_much_names_the_maximum(splits: Splits) -> None:
    most = len(splits["test"])
    with pytest.raises(SetupError, match=f"dialogue has {most} test rows, not {most + 1}: set sizes.test"):
        load_dialogue({"test": most + 1})
