"""Minimal corruptions of a sentence: one small edit that breaks its grammar, for the acceptability task.

The idea of minimal pairs is BLiMP's (Warstadt et al. 2020); the edits are ours: wrong agreement or article, a function
word deleted, a determiner swapped with the word after it, or moved two words on. The first and last word stay, so
neither the capital nor the final mark gives the label away.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

AGREEMENT = {
    "is": "are", "are": "is", "was": "were", "were": "was", "has": "have", "have": "has", "does": "do", "do": "does",
    "a": "an", "an": "a", "isn't": "aren't", "aren't": "isn't", "doesn't": "don't", "don't": "doesn't",
}  # fmt: skip
DELETABLE = frozenset({"a", "an", "of", "to", "is", "are", "was", "were", "be", "been"})
DETERMINERS = frozenset({"the", "a", "an", "its", "his", "her", "their", "our", "my", "your"})
# After these words the deletion, or the subjunctive, leaves good English ("all the film", "help make", "if it were").
OPTIONAL_AFTER = frozenset({"all", "both", "out", "off", "half", "inside", "outside", "help", "helps", "that", "which"})
SUBJUNCTIVE = frozenset({"if", "wish", "though"})


def corruptions(sentence: str) -> dict[str, list[str]]:
    """Every corrupted form of a sentence, by kind of edit; empty if no edit applies."""
    found: dict[str, list[str]] = {}
    for kind, words in _edits(sentence.split()):
        found.setdefault(kind, []).append(" ".join(words))
    return found


def corrupt(sentence: str) -> str:
    """One corrupted form, chosen by the sentence itself: first the kind, then the place. ValueError if none applies."""
    found = corruptions(sentence)
    if not found:
        raise ValueError(f"no corruption applies to {sentence!r}")
    chooser = random.Random(sentence)
    return chooser.choice(found[chooser.choice(sorted(found))])


def _plain(word: str) -> bool:
    return word.isalpha() and word.islower()


def _edits(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    lowered = {word.lower() for word in words}
    for i in range(1, len(words) - 1):
        word, before, after = words[i], words[i - 1].lower(), words[i + 1]
        if word in AGREEMENT and not (word in ("was", "were") and lowered & SUBJUNCTIVE):
            yield "agreement", [*words[:i], AGREEMENT[word], *words[i + 1 :]]
        if word in DELETABLE and before not in OPTIONAL_AFTER:
            yield "deleted", [*words[:i], *words[i + 1 :]]
        if word not in DETERMINERS or i + 2 >= len(words) or not _plain(after) or after == word:
            continue
        yield "swapped", [*words[:i], after, word, *words[i + 2 :]]
        if i + 3 < len(words) and _plain(words[i + 2]):
            yield "moved", [*words[:i], after, words[i + 2], word, *words[i + 3 :]]
