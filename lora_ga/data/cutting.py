"""How the local tasks answered in words are cut: length of a row, splits by hash, rows per split."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

from lora_ga.data.tasks import Example
from lora_ga.errors import SetupError

Splits = dict[str, tuple[Example, ...]]

_PIECE = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_|\n")


def pieces(text: str) -> int:
    """The number of words, digits, marks and line ends of a text.

    Close to the tokens of SmolLM2, which splits numbers into digits; and the rows do not hang on a model's tokenizer.
    """
    return len(_PIECE.findall(text))


def by_hash(name: str, keys: Iterable[str]) -> list[str]:
    """The distinct keys in an order that depends on the keys and the task's name alone."""
    return sorted(set(keys), key=lambda key: hashlib.sha256(f"{name}:{key}".encode()).digest())


def assign(name: str, keys: Iterable[str], shares: Mapping[str, float]) -> dict[str, str]:
    """The split of every key: by_hash order, cut by the splits' shares (which sum to 1)."""
    ordered = by_hash(name, keys)
    places: dict[str, str] = {}
    start, share = 0, 0.0
    for split, part in shares.items():
        share += part
        stop = round(share * len(ordered))
        places |= dict.fromkeys(ordered[start:stop], split)
        start = stop
    return places


def first_rows(name: str, available: Splits, sizes: Mapping[str, int | None] | None) -> Splits:
    """The first rows of every split of a task.

    Args: sizes, rows per split (absent or None = all there are).
    Errors: SetupError for an unknown split, a negative size, or more rows asked for than there are.
    """
    sizes = sizes or {}
    unknown = sorted(set(sizes) - set(available))
    if unknown:
        raise SetupError(f"sizes names the unknown split {unknown[0]!r} of task {name}: use {', '.join(available)}")
    for split, size in sizes.items():
        most = len(available[split])
        if size is not None and not 0 <= size <= most:
            raise SetupError(f"task {name} has {most} {split} rows, not {size}: set sizes.{split} to 0..{most}")
    return {split: rows[: sizes.get(split)] for split, rows in available.items()}
