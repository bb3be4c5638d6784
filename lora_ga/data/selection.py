"""Which rows of a task are trained on and which are held out, and in which order, under a protocol.

Source: LoRA-GA, LoRA-Pro and LoRA-One, reproduce/data.py: the first rows that are short enough are train, the next ones
validation. They call `dataset.shuffle(seed=42)` and drop its result, so their order is that of the file.
Differs in: rows are counted by the run's own tokenizer; order "shuffled" really shuffles; no train row is a validation
row too, not even in MetaMathQA full, where the last rows are held out; too few rows are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lora_ga.data.tasks import Example
from lora_ga.errors import SetupError

Pair = tuple[str, str]  # (prompt, target)
FILTERED = ("train", "validation")
BATCH = 1000  # rows tokenised at once: enough to keep the tokenizer's threads busy, little enough to stop in time
SHUFFLE_SEED = 42  # the seed of the authors' ineffective shuffle


@dataclass(frozen=True)
class RowRule:
    """Order of the rows, and the number of tokens a row must stay below (None = any length)."""

    order: Literal["file", "shuffled"]
    max_tokens: int | None


@dataclass(frozen=True)
class Selection:
    """The chosen rows of each split as (prompt, target), and for the record how they were chosen."""

    splits: dict[str, list[Pair]]
    report: dict[str, Any]


def select_rows(
    splits: Mapping[str, Sequence[Example]],
    *,
    render: Callable[[Example], Pair],
    rule: RowRule,
    sizes: Mapping[str, int | None],
    tokenizer: PreTrainedTokenizerBase,
    seed: int = SHUFFLE_SEED,
) -> Selection:
    """Choose rows by a protocol's rule, reading no more of a source than needed.

    A task's own validation rows are filtered and cut like its train rows. Without them validation is cut from train:
    the rows after the first sizes.train, or the last ones where sizes.train is None (then train is the rest); where
    sizes.validation is None, all rows after train. Other splits keep every length and their order.
    Args: render, row -> (prompt, target); sizes, rows per split (None or absent = all, but no validation rows are cut
        from train unless asked for); tokenizer, counts prompt + " " + target; seed of the shuffle.
    Errors: SetupError if fewer rows pass than asked for, naming how many do.
    """
    _check(splits, sizes)
    reader = _Reader(render, rule, tokenizer, seed)
    chosen: dict[str, list[Pair]] = {}
    if "validation" in splits:
        for split in FILTERED:
            chosen[split] = _first(reader.passing(split, splits[split], sizes.get(split)), sizes.get(split), split)
    else:
        chosen["train"], chosen["validation"] = _from_train(reader, splits["train"], sizes)
    for split in (name for name in splits if name not in FILTERED):
        size = sizes.get(split)
        chosen[split] = _first([render(row) for row in splits[split][:size]], size, split)
    prompts = {prompt for prompt, _ in chosen["train"]}
    shared = sum(prompt in prompts for prompt, _ in chosen["validation"])
    report = {"order": rule.order, "max_tokens": rule.max_tokens, "shuffle_seed": reader.seed, "read": reader.counts}
    return Selection(chosen, {**report, "validation_prompts_in_train": shared})


def _check(splits: Mapping[str, Sequence[Example]], sizes: Mapping[str, int | None]) -> None:
    for split, size in sizes.items():
        if size is not None and size < 0:
            raise SetupError(f"sizes.{split} is negative: use a number of rows, or null for all")
        if size and split not in (*splits, "validation"):
            raise SetupError(f"the task has no {split} rows: set sizes.{split} to 0, it has {', '.join(splits)}")
    if "validation" not in splits and sizes.get("train") is None and sizes.get("validation", 0) is None:
        raise SetupError("sizes.train and sizes.validation are both null, but both come from train: set one")


def _first(rows: list[Pair], size: int | None, split: str) -> list[Pair]:
    if size is not None and len(rows) < size:
        raise SetupError(
            f"{len(rows)} {split} rows pass, not {size}: set sizes.{split} to {len(rows)} or less, or raise max_tokens"
        )
    return rows[:size]


def _from_train(
    reader: _Reader, rows: Sequence[Example], sizes: Mapping[str, int | None]
) -> tuple[list[Pair], list[Pair]]:
    train, held = sizes.get("train"), sizes.get("validation", 0)
    wanted = None if train is None or held is None else train + held
    passing = reader.passing("train", rows, wanted)
    if len(passing) < (train or 0) + (held or 0):
        raise SetupError(
            f"{len(passing)} rows pass, not {train or 0} for train and {held or 0} for validation: "
            "lower sizes.train or sizes.validation (null = what is left), or raise max_tokens"
        )
    cut = len(passing) - (held or 0) if train is None else train
    return passing[:cut], passing[cut:]


class _Reader:
    """Reads rows in the rule's order, keeps those short enough, and counts what it did."""

    def __init__(
        self, render: Callable[[Example], Pair], rule: RowRule, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> None:
        self.render, self.rule, self.tokenizer = render, rule, tokenizer
        self.seed = seed if rule.order == "shuffled" else None
        self.counts: dict[str, dict[str, int]] = {}

    def passing(self, split: str, rows: Sequence[Example], wanted: int | None) -> list[Pair]:
        """The first `wanted` rows that pass (None = all)."""
        counts = self.counts[split] = {"rows": len(rows), "seen": 0, "too_long": 0}
        kept: list[Pair] = []
        if wanted == 0:
            return kept
        total = len(rows) if wanted is None else min(wanted, len(rows))
        with tqdm(total=total, desc=f"select {split}", unit="row", leave=False, disable=total < 5000) as bar:
            for pair, fits in self._judged(rows, total):
                counts["seen"] += 1
                counts["too_long"] += not fits
                bar.update(int(fits or wanted is None))
                if fits:
                    kept.append(pair)
                if len(kept) == wanted:
                    break
        return kept

    def _judged(self, rows: Sequence[Example], wanted: int) -> Iterator[tuple[Pair, bool]]:
        order: Sequence[int] = range(len(rows))
        if self.seed is not None:
            # The permutation that datasets' own shuffle(seed) would have given the authors.
            order = numpy.random.default_rng(self.seed).permutation(len(rows)).tolist()
        size = min(BATCH, max(1, wanted))
        for start in range(0, len(order), size):
            pairs = [self.render(rows[index]) for index in order[start : start + size]]
            yield from zip(pairs, self._fit(pairs), strict=True)

    def _fit(self, pairs: Sequence[Pair]) -> list[bool]:
        limit = self.rule.max_tokens
        if limit is None:
            return [True] * len(pairs)
        ids = self.tokenizer([f"{prompt} {target}" for prompt, target in pairs])["input_ids"]
        return [len(found) < limit for found in ids]
