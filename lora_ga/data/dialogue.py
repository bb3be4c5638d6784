"""The next turn of an open conversation between two people.

Source: chitchat-dataset 0.9.0 (BYU, MIT), conversations of people who wrote to each other by turns; the messages of a
turn are joined. Who answers is called Assistant, the other one User.
Differs in: short turns in ASCII without addresses only, at most two answers of a conversation, no answer twice.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from lora_ga.data.assets import asset
from lora_ga.data.cutting import Splits, assign, by_hash, first_rows, pieces
from lora_ga.data.local_recipes import normalise
from lora_ga.data.tasks import Example

SHARES = {"train": 0.80, "validation": 0.10, "test": 0.10}
PER_CONVERSATION = 2
HISTORY = 2  # turns before the query
MAX_PIECES = 70  # of history, query and response: a mean of 56 tokens of SmolLM2
WORDS = range(4, 41)  # of a response: shorter ones say "yeah me too"
QUERY_WORDS = 2  # at least: one word asks nothing
_ADDRESS = re.compile(r"https?:|www\.|\w\.(?:com|org|edu|net)\b|@|<")


def load_dialogue(
    sizes: Mapping[str, int | None] | None = None, *, max_pieces: int = MAX_PIECES
) -> tuple[Splits, tuple[str, ...]]:
    """Turns of conversations in the splits train, validation and test; a conversation lies in one split.

    Args: sizes, rows per split (absent or None = all there are); max_pieces, the longest row kept.
    Returns: splits and notes. Fields: history (one or two earlier turns, one a line, each after `User: ` or
    `Assistant: `), query (the last turn), response (the Assistant's next one), conversation (its name).
    Errors: SetupError for an unknown split, or more rows asked for than there are.
    """
    path = asset("chitchat")
    note = (
        "dialogue: short turns of chitchat-dataset 0.9.0 (BYU, MIT), conversations between people; "
        "split by conversation, no response twice"
    )
    return first_rows("dialogue", _splits(max_pieces, path), sizes), (note,)


@functools.cache
def _splits(max_pieces: int, path: Path) -> Splits:
    """All rows by split, in an order in which those of one conversation are apart."""
    conversations = json.loads(path.read_text(encoding="utf-8"))
    seen: set[str] = set()
    rows: dict[str, Example] = {}
    for name in by_hash("dialogue", conversations):
        turns = [" ".join(" ".join(part["text"] for part in turn).split()) for turn in conversations[name]["messages"]]
        fresh = (
            index
            for index in Random(f"dialogue-{name}").sample(range(len(turns)), len(turns))
            if _usable(turns, index, max_pieces) and normalise(turns[index]) not in seen
        )
        # One at a time: `seen` has to hold the first before the second is looked for.
        for index in itertools.islice(fresh, PER_CONVERSATION):
            seen.add(normalise(turns[index]))
            rows[f"{name}-{index}"] = _row(name, turns, index)
    places = assign("dialogue", (row.fields["conversation"] for row in rows.values()), SHARES)
    ordered = [rows[key] for key in by_hash("dialogue-rows", rows)]
    return {split: tuple(row for row in ordered if places[row.fields["conversation"]] == split) for split in SHARES}


def _usable(turns: Sequence[str], index: int, max_pieces: int) -> bool:
    """Whether turn and query are long enough, a turn came before, and the row is short, plain and has no address."""
    near = "\n".join(turns[max(0, index - HISTORY - 1) : index + 1])
    return (
        index >= 2
        and len(turns[index].split()) in WORDS
        and len(turns[index - 1].split()) >= QUERY_WORDS
        and near.isascii()
        and not _ADDRESS.search(near)
        and pieces(near) <= max_pieces
    )


def _row(name: str, turns: Sequence[str], index: int) -> Example:
    """Two earlier turns where the conversation has them: speakers take turns, so the parity tells who spoke."""
    earlier = range(max(0, index - HISTORY - 1), index - 1)
    history = "\n".join(f"{'User' if (index - at) % 2 else 'Assistant'}: {turns[at]}" for at in earlier)
    return Example({"history": history, "query": turns[index - 1], "response": turns[index], "conversation": name})
