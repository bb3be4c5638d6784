"""Six NLU tasks made from sets that PyPI carries, five in the form of GLUE's five but never under their names.

Texts and mean human ratings (-4 to 4): movie reviews (Rotten Tomatoes, Pang & Lee 2004-5), Amazon reviews, NYT
editorials, tweets, all in Hutto & Gilbert, "VADER", ICWSM 2014 (vaderSentiment, MIT). Conversations: chitchat-dataset
(BYU, MIT). Sentiment labels are the sets' own human raters'; reply and acceptability labels come from construction.
Deterministic whatever the run's seed: sources are deduplicated by normalised text, ordered by hash and split 60/15/25
first; rows are built inside a split, each text used at most once. Labels are balanced in every prefix of a split.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_ga.data.assets import asset
from lora_ga.data.local_recipes import RECIPES, Rows
from lora_ga.data.tasks import SPLITS, Example, TaskData
from lora_ga.errors import SetupError

SHARES = {"train": 0.60, "validation": 0.15, "test": 0.25}
DEFAULT_SIZES: Mapping[str, int] = {"train": 1024, "validation": 256, "test": 400}


def load_local(name: str, *, sizes: Mapping[str, int | None]) -> TaskData:
    """Build a local task.

    Args: sizes, rows per split (absent = DEFAULT_SIZES, None = all there are).
    Returns: TaskData. Errors: SetupError for an unknown task, or more rows asked for than there are.
    """
    if name not in RECIPES:
        raise SetupError(f"unknown local task {name!r}: use one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    available = _splits(name, asset("movie_reviews").parents[1])
    splits = {}
    for split in SPLITS:
        size = sizes.get(split, DEFAULT_SIZES[split])
        rows = available[split]
        if size is not None and size > len(rows):
            raise SetupError(
                f"task {name} has {len(rows)} {split} rows, not {size}: set sizes.{split} to {len(rows)} or less"
            )
        splits[split] = rows[:size]
    return TaskData(name, recipe.labels, splits, (recipe.note,))


@functools.cache
def _splits(name: str, cache: Path) -> dict[str, tuple[Example, ...]]:
    """All rows of a task by split; `cache` only tells one asset folder from another."""
    recipe = RECIPES[name]
    groups: dict[str, list[Any]] = {}
    for item in recipe.sources():
        groups.setdefault(recipe.key(item), []).append(item)
    keys = sorted(groups, key=lambda key: hashlib.sha256(f"{name}:{key}".encode()).digest())
    splits, start, share = {}, 0, 0.0
    for split in SPLITS:
        share += SHARES[split]
        stop = round(share * len(keys))
        rows = recipe.build([item for key in keys[start:stop] for item in groups[key]])
        splits[split] = _interleave(rows, random.Random(f"{name}-{split}"))
        start = stop
    return splits


def _interleave(rows: Rows, order: random.Random) -> tuple[Example, ...]:
    """Blocks of one row per label in random order, so that every prefix is balanced and no pattern repeats."""
    mixed: list[Example] = []
    for block in zip(*(rows[label] for label in sorted(rows)), strict=False):
        mixed.extend(order.sample(block, len(block)))
    return tuple(mixed)
