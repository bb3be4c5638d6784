"""Proves: the local tasks are deterministic, balanced in every prefix, short, and leak between no splits."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from lora_ga.data import local
from lora_ga.data.assets import asset
from lora_ga.data.corruption import corrupt, corruptions
from lora_ga.data.local_recipes import ONE_TEXT, RECIPES, TWO_TEXTS, normalise
from lora_ga.data.tasks import SPLITS, TaskData
from lora_ga.errors import SetupError

ALL = dict.fromkeys(SPLITS)
SMALLEST = {"train": 512, "validation": 256, "test": 400}


def texts(data: TaskData, split: str) -> list[str]:
    return [normalise(text) for row in data.splits[split] for text in row.fields.values()]


@pytest.fixture(params=sorted(RECIPES))
def everything(request: pytest.FixtureRequest) -> TaskData:
    return local.load_local(request.param, sizes=ALL)


def test_no_text_serves_twice_in_a_split_or_in_two(everything: TaskData) -> None:
    found = [text for split in SPLITS for text in texts(everything, split)]
    assert len(found) == len(set(found))
    assert "" not in found


def test_every_prefix_is_balanced(everything: TaskData) -> None:
    for split in SPLITS:
        rows, labels = everything.splits[split], len(everything.labels)
        for length in (labels, 10 * labels, len(rows) - len(rows) % labels):
            counts = Counter(row.label for row in rows[:length])
            assert set(counts.values()) == {length // labels}


def test_default_sizes_are_there(everything: TaskData) -> None:
    assert all(len(everything.splits[split]) >= size for split, size in SMALLEST.items())
    if everything.name != "pairs":
        assert len(everything.splits["train"]) >= 1024


def test_texts_are_short(everything: TaskData) -> None:
    low, high = ONE_TEXT if everything.name in ("movies", "tone", "acceptability") else TWO_TEXTS
    slack = 1 if everything.name == "acceptability" else 0  # a corruption may delete a word
    for split in SPLITS:
        for row in everything.splits[split]:
            assert all(low - slack <= len(text.split()) <= high for text in row.fields.values())


def test_same_rows_from_scratch_and_smaller_sizes_are_prefixes() -> None:
    first = local.load_local("compare", sizes=ALL)
    local._splits.cache_clear()
    again = local.load_local("compare", sizes={"train": 30, "validation": 0, "test": None})
    assert again.splits["train"] == first.splits["train"][:30]
    assert again.splits["validation"] == ()
    assert again.fingerprint("test") == first.fingerprint("test")


# Of the first SMALLEST rows of train, validation and test.
FINGERPRINTS = {
    "acceptability": ("e20425dfd269c135", "1a83ad63a7d42765", "d8c0669968976206"),
    "compare": ("ee892acb66a154b6", "86653807eba02a24", "01c0b178ef85a8d5"),
    "movies": ("6c461a65f5ad716f", "18f82de14a061002", "fe09b632476472d0"),
    "pairs": ("07e47be2a06196c7", "114221eaeede551d", "54149bc45d3911f9"),
    "tone": ("def264fd89fd42b7", "04866828344f96a4", "0171527ad576b67d"),
    "reply": ("044e854c1ef90d5e", "b386c7cd3a855ea0", "c9a0acd76533b871"),
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_rows_are_the_ones_of_the_committed_results(name: str) -> None:
    # A changed fingerprint means that new numbers are no longer comparable with the committed ones.
    data = local.load_local(name, sizes=SMALLEST)
    assert tuple(data.fingerprint(split) for split in SPLITS) == FINGERPRINTS[name]


def test_asking_for_too_much_names_the_maximum() -> None:
    most = len(local.load_local("pairs", sizes=ALL).splits["train"])
    with pytest.raises(SetupError, match=f"set sizes.train to {most} or less"):
        local.load_local("pairs", sizes={"train": most + 1})


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(SetupError, match="movies"):
        local.load_local("sst2", sizes={})


def test_replies_label_true_neighbours_and_conversations_stay_in_one_split() -> None:
    sources = RECIPES["reply"].sources()
    asked = {item.question: item for item in sources}
    answered = {item.reply: item for item in sources}
    data = local.load_local("reply", sizes=ALL)
    places: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for row in data.splits[split]:
            question, reply = asked[row.fields["question"]], answered[row.fields["sentence"]]
            assert (question.conversation == reply.conversation) == (question == reply) == (row.label == 1)
            places[split] |= {question.conversation, reply.conversation}
    assert sum(len(found) for found in places.values()) == len(set().union(*places.values()))


def test_true_replies_follow_their_question_in_the_data() -> None:
    conversations = json.loads(asset("chitchat").read_text(encoding="utf-8"))
    for item in RECIPES["reply"].sources()[:200]:
        turns = [" ".join(part["text"] for part in turn) for turn in conversations[item.conversation]["messages"]]
        assert (normalise(item.question), normalise(item.reply)) in set(itertools.pairwise(map(normalise, turns)))


def ratings() -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ("movie_reviews", "amazon_reviews", "nyt_editorials", "tweets"):
        for line in asset(name).read_text(encoding="utf-8").strip().split("\n"):
            _, rating, text = line.split("\t")
            found.setdefault(normalise(text), float(rating))
    return found


def test_sentiment_labels_are_the_raters() -> None:
    known = ratings()
    for row in local.load_local("movies", sizes=ALL).splits["test"]:
        rating = known.get(normalise(row.fields["sentence"]))
        assert rating is None or ((rating > 0) == (row.label == 1) and abs(rating) >= 1.0)
    checked = 0
    for row in local.load_local("compare", sizes=ALL).splits["test"]:
        one, two = (known.get(normalise(row.fields[field])) for field in ("sentence1", "sentence2"))
        if one is None or two is None:
            continue  # escaped characters: the raw text differs
        checked += 1
        assert (one - two > 2.0, two - one > 2.0, abs(one - two) < 0.4).index(True) == row.label
    assert checked > 300


def test_a_corruption_is_one_edit_inside_the_sentence() -> None:
    sentence = "It is the kind of film that has a story to tell."
    found = corruptions(sentence)
    assert set(found) == {"agreement", "deleted", "swapped", "moved"}
    assert "It are the kind of film that has a story to tell." in found["agreement"]
    assert "It is kind the of film that has a story to tell." in found["swapped"]
    assert "It is kind of the film that has a story to tell." in found["moved"]
    for text in itertools.chain.from_iterable(found.values()):
        assert text != sentence and text.startswith("It ") and text.endswith(" tell.")
    assert corrupt(sentence) == corrupt(sentence)
    assert corruptions("Go home.") == {}
