"""How each local task is made: its sources, what must stay together in one split, the rows built inside a split.

Sources and licences: see local.py. A row is built from one split's texts only, and no text serves twice in a task.
"""

from __future__ import annotations

import html
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ga.data.assets import asset
from lora_ga.data.corruption import corrupt, corruptions
from lora_ga.data.tasks import Example

CLEAR = 1.0  # a mean rating this far from 0 has a clear sign
NEUTRAL = 0.5  # ... and this near to 0 none
APART, ALIKE = 2.0, 0.4  # two mean ratings differ, or do not
ONE_TEXT, TWO_TEXTS = (4, 18), (3, 12)  # words: short enough to train on two cores
PAIRS_PER_CONVERSATION = 2
# A sentence for the acceptability task has one of these, so that verbless review fragments stay out.
FINITE = re.compile(
    r"\b(is|are|was|were|has|have|had|does|do|did|will|would|can|could|should|may|might|must|(is|are|was|does|do|did)n't"
    r"|won't|can't|(it|that|there|he|she)'s|(they|we|you)'re|i'm)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Rated:
    """A text with its mean human rating and the set it is from."""

    text: str
    rating: float
    origin: str


@dataclass(frozen=True)
class Turns:
    """Two neighbouring turns of one conversation."""

    question: str
    reply: str
    conversation: str


Rows = dict[int, list[Example]]


@dataclass(frozen=True)
class Recipe:
    """How a task is made: its sources, what keeps them together in one split, and the rows built from a split."""

    labels: tuple[str, ...]
    sources: Callable[[], Sequence[Any]]
    key: Callable[[Any], str]
    build: Callable[[Sequence[Any]], Rows]
    note: str


def normalise(text: str) -> str:
    """Letters and digits in lower case, one space between words: equal for texts that differ in form only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _rated(names: Iterable[str], words: tuple[int, int]) -> list[Rated]:
    """Texts of the named sets with a number of words in range, each normalised text once."""
    found: dict[str, Rated] = {}
    for name in names:
        # The archive's readme says latin-1, but the bytes are UTF-8 (and the NYT texts are escaped twice).
        for line in asset(name).read_text(encoding="utf-8").strip().split("\n"):
            _, rating, raw = line.split("\t")
            text = " ".join(html.unescape(html.unescape(raw)).split())
            if words[0] <= len(text.split()) <= words[1] and "http" not in text:
                found.setdefault(normalise(text), Rated(text, float(rating), name))
    return [item for key, item in found.items() if key]


def _text_key(item: Rated) -> str:
    return normalise(item.text)


def _movie_sources() -> list[Rated]:
    return [item for item in _rated(["movie_reviews"], ONE_TEXT) if abs(item.rating) >= CLEAR]


def _movie_rows(items: Sequence[Rated]) -> Rows:
    rows: Rows = {0: [], 1: []}
    for item in items:
        rows[int(item.rating > 0)].append(Example({"sentence": item.text}, int(item.rating > 0)))
    return rows


def _tone(rating: float) -> int | None:
    """negative 0, neutral 1, positive 2; None in between."""
    if abs(rating) >= CLEAR:
        return 2 if rating > 0 else 0
    return 1 if abs(rating) < NEUTRAL else None


def _tone_sources() -> list[Rated]:
    return [item for item in _rated(["amazon_reviews", "tweets"], ONE_TEXT) if _tone(item.rating) is not None]


def _tone_rows(items: Sequence[Rated]) -> Rows:
    rows: Rows = {0: [], 1: [], 2: []}
    # As many of each label from each set: neutral tweets and positive ones must not differ by their source alone.
    for origin in sorted({item.origin for item in items}):
        found: Rows = {label: [] for label in rows}
        for item in items:
            label = _tone(item.rating)
            if item.origin == origin and label is not None:
                found[label].append(Example({"sentence": item.text}, label))
        for block in zip(*found.values(), strict=False):
            for row in block:
                rows[row.label].append(row)
    return _reorder(rows)


def _sentence_sources() -> list[Rated]:
    def whole(text: str) -> bool:
        marked = text[0].isupper() and text[-1] in ".!?" and not re.search(r"[\"()\[\];:]|''|\.\.|--", text)
        return marked and bool(FINITE.search(text)) and bool(corruptions(text))

    return [item for item in _rated(["movie_reviews", "nyt_editorials"], ONE_TEXT) if whole(item.text)]


def _acceptability_rows(items: Sequence[Rated]) -> Rows:
    # Both labels are drawn from the sentences that can be corrupted, so the choice of sentence says nothing.
    bad = [Example({"sentence": corrupt(item.text)}, 0) for item in items[::2]]
    return {0: bad, 1: [Example({"sentence": item.text}, 1) for item in items[1::2]]}


def _compare_sources() -> list[Rated]:
    return _rated(["movie_reviews", "amazon_reviews", "nyt_editorials"], TWO_TEXTS)


def _compare_rows(items: Sequence[Rated]) -> Rows:
    fits: dict[int, Callable[[float], bool]] = {
        0: lambda difference: difference > APART,
        1: lambda difference: difference < -APART,
        2: lambda difference: abs(difference) < ALIKE,
    }
    rows: Rows = {0: [], 1: [], 2: []}
    # Both texts come from one set: NYT texts are nearly all neutral, so mixed pairs would betray "neither".
    for origin in sorted({item.origin for item in items}):
        pool = [item for item in items if item.origin == origin]
        made: Rows = {0: [], 1: [], 2: []}
        label = 0
        while pool:
            first = pool.pop(0)
            # Every second row puts the text found second in first place, so that neither place is special.
            turned = len(made[label]) % 2 == 1
            sign = -1 if turned else 1
            wanted = (i for i, item in enumerate(pool) if fits[label](sign * (first.rating - item.rating)))
            match = next(wanted, None)
            if match is not None:
                texts = (first.text, pool.pop(match).text)
                one, two = reversed(texts) if turned else texts
                made[label].append(Example({"sentence1": one, "sentence2": two}, label))
                label = (label + 1) % 3
        for block in zip(*made.values(), strict=False):
            for row in block:
                rows[row.label].append(row)
    return _reorder(rows)


def _reorder(rows: Rows) -> Rows:
    return {label: random.Random(f"reorder-{label}").sample(found, len(found)) for label, found in rows.items()}


def _pair_sources() -> list[Rated]:
    found = _rated(["movie_reviews", "amazon_reviews", "tweets"], TWO_TEXTS)
    return [item for item in found if abs(item.rating) >= CLEAR]


def _pair_rows(items: Sequence[Rated]) -> Rows:
    """Each of the four orders of signs equally often, so that one text alone says nothing of the label."""
    negative = [item.text for item in items if item.rating < 0]
    positive = [item.text for item in items if item.rating > 0]
    rows: Rows = {0: [], 1: []}
    while len(negative) >= 4 and len(positive) >= 4:
        for label, one, two in (
            (0, negative, positive),
            (1, negative, negative),
            (0, positive, negative),
            (1, positive, positive),
        ):
            rows[label].append(Example({"sentence1": one.pop(), "sentence2": two.pop()}, label))
    return rows


def _turn_sources() -> list[Turns]:
    """Questions and their replies; no text twice, at most PAIRS_PER_CONVERSATION a conversation, evenly placed."""
    data = json.loads(asset("chitchat").read_text(encoding="utf-8"))
    seen: set[str] = set()
    found = []
    for name, conversation in data.items():
        turns = [" ".join(" ".join(part["text"] for part in turn).split()) for turn in conversation["messages"]]
        usable = []
        for question, reply in itertools.pairwise(turns):
            short = all(TWO_TEXTS[0] <= len(text.split()) <= TWO_TEXTS[1] for text in (question, reply))
            keys = {normalise(question), normalise(reply)}
            if question.endswith("?") and short and "http" not in question + reply and not keys & (seen | {""}):
                seen |= keys
                usable.append(Turns(question, reply, name))
        found += random.Random(name).sample(usable, min(PAIRS_PER_CONVERSATION, len(usable)))
    return found


def _reply_rows(items: Sequence[Turns]) -> Rows:
    true, other = items[::2], items[1::2]
    shifts = (shift for shift in range(1, len(other)))
    shift = next(s for s in shifts if all(a.conversation != b.conversation for a, b in _rotated(other, s)))
    wrong = [Example({"question": a.question, "sentence": b.reply}, 0) for a, b in _rotated(other, shift)]
    return {0: wrong, 1: [Example({"question": a.question, "sentence": a.reply}, 1) for a in true]}


def _rotated(items: Sequence[Turns], shift: int) -> list[tuple[Turns, Turns]]:
    return list(zip(items, [*items[shift:], *items[:shift]], strict=True))


RECIPES: Mapping[str, Recipe] = {
    "movies": Recipe(
        ("negative", "positive"), _movie_sources, _text_key, _movie_rows,
        f"movie-review sentences whose mean human rating is at least {CLEAR} from 0; form of SST-2, not SST-2",
    ),
    "tone": Recipe(
        ("negative", "neutral", "positive"), _tone_sources, _text_key, _tone_rows,
        f"tweets and product reviews, mean human rating below -{CLEAR}, within {NEUTRAL} of 0, or above {CLEAR}; "
        "sentiment three ways, form of SST with a neutral class",
    ),
    "acceptability": Recipe(
        ("unacceptable", "acceptable"), _sentence_sources, _text_key, _acceptability_rows,
        "review and editorial sentences, half with one edit that breaks the grammar; form of CoLA, not CoLA",
    ),
    "compare": Recipe(
        ("first", "second", "neither"), _compare_sources, _text_key, _compare_rows,
        f"which of two snippets raters found more positive (mean ratings over {APART} apart, or less than {ALIKE}); "
        "form of MNLI, not MNLI",
    ),
    "reply": Recipe(
        ("false", "true"), _turn_sources, lambda item: item.conversation, _reply_rows,
        "is the second text the reply the question got, or one from another conversation; form of QNLI, not QNLI",
    ),
    "pairs": Recipe(
        ("different", "equivalent"), _pair_sources, _text_key, _pair_rows,
        "did raters give two snippets the same sign of sentiment; form of MRPC, not MRPC",
    ),
}  # fmt: skip
