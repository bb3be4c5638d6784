"""Rows become the ids a model is meant to see: the target alone is scored, padding never; the cache knows its texts.

Causal rows use the tokenizer of the local asset, whose words begin with a space; T5 rows a tokenizer of a few words.
"""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lora_ga.data.encoding
from experiments.config import load_config
from lora_ga.data.encoding import IGNORED, Collator, EncodedRow, EncodedRows, encode_row, encode_rows
from lora_ga.models import load_tokenizer

ROWS = [("the film is good\nsentiment:", "positive"), ("a dull and far too long story\nsentiment:", "negative")]


@pytest.fixture(scope="module")
def subwords():
    return load_tokenizer(load_config(["model=llama_tiny"]).model)


WORDS = ["the", "film", "is", "good", "bad", "a", "very", "yes", "no"]


def words(extra=()):
    vocabulary = ["<pad>", "</s>", "<unk>", *WORDS, *extra]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", add_prefix_space=False
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The token cache in a folder of its own; counts how many rows were really encoded."""
    encoded = []
    plain = encode_row

    def counting(*args):
        encoded.append(args[1])
        return plain(*args)

    monkeypatch.setattr(lora_ga.data.encoding, "cache_folder", tmp_path.joinpath)
    monkeypatch.setattr(lora_ga.data.encoding, "encode_row", counting)
    return encoded


# One row


@pytest.mark.parametrize(("prompt", "target"), ROWS)
def test_causal_ids_are_the_text_a_reader_would_see(subwords, prompt, target):
    row = encode_row(subwords, prompt, target, "causal", 128)
    assert row.target[-1] == subwords.eos_token_id
    assert row.prompt + row.target[:-1] == subwords(f"{prompt} {target}")["input_ids"]
    assert subwords.decode(row.prompt) == prompt
    assert subwords.decode(row.target[:-1]) == f" {target}"


def test_a_token_across_the_seam_belongs_to_the_target(subwords):
    """ "1" and "1 0": whatever the tokenizer merges, prompt and target together are the whole text."""
    for prompt, target in [("the sum is 1", "0"), ("word", "s"), ("ends in a space ", "x"), ("", "alone")]:
        row = encode_row(subwords, prompt, target, "causal", 128)
        assert row.prompt + row.target[:-1] == subwords(f"{prompt} {target}")["input_ids"]
        assert len(row.target) >= 2


def test_t5_source_and_target_both_end_with_eos():
    tokenizer = words()
    row = encode_row(tokenizer, "the film is good", "yes", "seq2seq", 128)
    assert tokenizer.convert_ids_to_tokens(row.prompt) == ["the", "film", "is", "good", "</s>"]
    assert tokenizer.convert_ids_to_tokens(row.target) == ["yes", "</s>"]


@pytest.mark.parametrize("length", [2, 6, 10])
def test_truncation_keeps_the_target(subwords, length):
    prompt = "one two three four five six seven eight nine ten eleven twelve"
    whole = encode_row(subwords, prompt, "positive", "causal", 128)
    row = encode_row(subwords, prompt, "positive", "causal", length)
    assert row.target == whole.target
    assert row.prompt == whole.prompt[: max(1, length - len(row.target))]
    assert len(row.prompt) + len(row.target) == max(length, 1 + len(row.target))

    tokenizer = words()
    short = encode_row(tokenizer, "the film is very very very very very very good", "no", "seq2seq", length)
    assert tokenizer.convert_ids_to_tokens(short.target) == ["no", "</s>"]
    assert len(short.prompt) == length and short.prompt[-1] == tokenizer.eos_token_id


# A batch


def test_causal_batch_scores_the_target_and_nothing_else():
    batch = Collator("causal", pad_token_id=0)([EncodedRow([5, 6, 7], [8, 1]), EncodedRow([9], [10, 11, 1])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 8, 1], [10, 11, 1, IGNORED]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_t5_batch_masks_labels_at_padding():
    """The pad id is a label nowhere, though it is the first decoder input; LoRA-GA's default counted it."""
    collator = Collator("seq2seq", pad_token_id=0, decoder_start_token_id=2)
    batch = collator([EncodedRow([5, 6, 1], [8, 9, 10, 1]), EncodedRow([7, 1], [8, 1])])
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[8, 9, 10, 1], [8, 1, IGNORED, IGNORED]]
    assert batch["decoder_input_ids"].tolist() == [[2, 8, 9, 10], [2, 8, 0, 0]]


def test_a_pad_id_that_is_the_eos_is_still_scored_once():
    """Llama has no pad token and pads with eos: the target's eos counts, the padding's does not."""
    batch = Collator("causal", pad_token_id=1)([EncodedRow([5, 6], [8, 9, 1]), EncodedRow([5], [8, 1])])
    assert (batch["labels"] == 1).sum(dim=1).tolist() == [1, 1]


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
def test_shapes_and_the_number_of_scored_tokens(random_rows, collators, architecture):
    rows = random_rows(7)
    batch = collators[architecture](rows)
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert {value.shape[0] for value in batch.values()} == {7}
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    output = batch["decoder_input_ids" if architecture == "seq2seq" else "input_ids"]
    assert batch["labels"].shape == output.shape
    assert (batch["labels"] != IGNORED).sum(dim=1).tolist() == [len(row.target) for row in rows]
    spare = 1 if architecture == "causal" else 0  # the last token is a label only
    lengths = [len(row.prompt) + (len(row.target) - spare) * spare for row in rows]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths


def test_padding_changes_no_logits(tiny, random_rows, collators):
    """A row alone and the same row beside a longer one give the model's same answer."""
    rows = random_rows(6)
    for architecture in ("causal", "seq2seq"):
        model, collator = tiny(architecture), collators[architecture]
        with torch.no_grad():
            together = collator(rows)
            labels = together.pop("labels")
            full = model(**together).logits
            for i, row in enumerate(rows):
                alone = collator([row])
                mask = alone.pop("labels") != IGNORED
                torch.testing.assert_close(
                    full[i][labels[i] != IGNORED], model(**alone).logits[mask], rtol=1e-4, atol=1e-4
                )


def test_lengths_count_prompt_and_target():
    rows = EncodedRows([EncodedRow([1, 2], [3]), EncodedRow([1], [2, 3, 4])])
    assert rows.lengths() == [3, 4] and len(rows) == 2 and rows[1].target == [2, 3, 4]


# The cache


def test_the_same_rows_are_read_back_equal(cache):
    rows = [("the film is good", "yes"), ("a very bad film", "no")]
    first = encode_rows(words(), rows, "seq2seq", 16)
    assert len(cache) == 2
    again = encode_rows(words(), rows, "seq2seq", 16)
    assert again == first and len(cache) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [("the film is good", "yes"), ("a very bad film", "yes")]},
        {"rows": [("the film is good", "yes"), ("a very good film", "no")]},
        {"rows": [("a very bad film", "no"), ("the film is good", "yes")]},
        {"rows": [("the film is good", "yes")]},
        {"tokenizer": words(["more"])},
        {"architecture": "causal"},
        {"max_length": 17},
    ],
    ids=["target", "prompt", "order", "fewer", "tokenizer", "architecture", "max_length"],
)
def test_any_change_misses_the_cache(cache, change):
    settings = {
        "tokenizer": words(),
        "rows": [("the film is good", "yes"), ("a very bad film", "no")],
        "architecture": "seq2seq",
        "max_length": 16,
    }
    encode_rows(**settings)
    cache.clear()
    changed = {**settings, **change}
    encode_rows(**changed)
    assert len(cache) == len(changed["rows"])


def test_a_tokenizer_that_splits_otherwise_misses_the_cache(cache):
    """Same vocabulary, other rules: the ids differ, so the cache must not answer."""
    lower = words()
    tokenizer = Tokenizer.from_str(lower.backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("_")
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    rows = [("the film", "yes")]
    assert lower.get_vocab() == other.get_vocab()
    encode_rows(lower, rows, "seq2seq", 16)
    cache.clear()
    encode_rows(other, rows, "seq2seq", 16)
    assert len(cache) == 1


def test_without_the_cache_nothing_is_written(cache, tmp_path):
    encode_rows(words(), [("the film", "yes")], "seq2seq", 16, cache=False)
    encode_rows(words(), [("the film", "yes")], "seq2seq", 16, cache=False)
    assert len(cache) == 2 and not list(tmp_path.iterdir())


def test_a_crash_while_writing_leaves_nothing_to_read(cache, tmp_path, monkeypatch):
    def broken(tensors, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    rows = [("the film", "yes")]
    with monkeypatch.context() as patched:
        patched.setattr(lora_ga.data.encoding, "save_file", broken)
        with pytest.raises(OSError, match="disk full"):
            encode_rows(words(), rows, "seq2seq", 16)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert encode_rows(words(), rows, "seq2seq", 16) == encode_rows(words(), rows, "seq2seq", 16)
