"""Rows become the ids a model is meant to see: the target alone is scored, padding never; the cache knows its texts.

Causal rows use the tokenizer of the local asset, whose words begin with a space; T5 rows a tokenizer of a few words.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import lora_ga.data.encoding
from experiments.config import load_config
from lora_ga.data.encoding import (
    IGNORED,
    TEXTS,
    Collator,
    EncodedRow,
    EncodedRows,
    encode_row,
    encode_rows,
    encode_texts,
)
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
    plain = encode_texts

    def counting(tokenizer, rows, *args):
        encoded.extend(rows)
        return plain(tokenizer, rows, *args)

    monkeypatch.setattr(lora_ga.data.encoding, "cache_folder", tmp_path.joinpath)
    monkeypatch.setattr(lora_ga.data.encoding, "encode_texts", counting)
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


# Many rows at once


def word_pieces(marks_start):
    """A tokenizer in T5's and Llama 2's way: one piece a character, a mark where words start, bytes for the unknown.

    `marks_start` adds Llama's first token to every text.
    """
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefgh ijklmnop,.019"]
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581a", "b"), ("0", "1")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    if marks_start:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def one_by_one(tokenizer, rows, architecture, max_length):
    """The rule of one row said plainly, with two calls of the tokenizer for each."""
    encoded, eos = [], tokenizer.eos_token_id
    for prompt, target in rows:
        if architecture == "seq2seq":
            source = tokenizer.encode(prompt, add_special_tokens=False)[: max_length - 1]
            encoded.append(EncodedRow([*source, eos], [*tokenizer.encode(target, add_special_tokens=False), eos]))
            continue
        alone, whole = tokenizer.encode(prompt), tokenizer.encode(f"{prompt} {target}")
        shared = 0
        while shared < len(alone) and (shared >= len(whole) or alone[shared] == whole[shared]):
            shared += 1
        answer = [*whole[shared:], eos]
        encoded.append(EncodedRow(whole[:shared][: max(1, max_length - len(answer))], answer))
    return encoded


TOKENIZERS = {"smollm2": None, "t5": word_pieces(False), "llama": word_pieces(True)}
text = st.one_of(st.text(max_size=30), st.text(alphabet="ab 01,.", max_size=60))


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(text, text), min_size=1, max_size=12), length=st.integers(2, 40))
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
def test_rows_encoded_together_are_the_rows_encoded_one_by_one(subwords, name, architecture, rows, length):
    """Any text: other scripts, emoji, line ends, empty prompts and targets, prompts that are cut."""
    tokenizer = TOKENIZERS[name] or subwords
    expected = one_by_one(tokenizer, rows, architecture, length)
    assert encode_texts(tokenizer, rows, architecture, length) == expected
    assert [encode_row(tokenizer, *row, architecture, length) for row in rows] == expected


def test_more_rows_than_are_encoded_at_once_come_in_order(subwords):
    rows = [(f"row {i}", str(-i)) for i in range(2 * TEXTS + 1)]
    together = encode_rows(subwords, rows, "causal", 16, cache=False)
    assert [subwords.decode([*row.prompt, *row.target[:-1]]) for row in together] == [
        f"row {i} {-i}" for i in range(len(rows))
    ]


def test_ids_stored_by_earlier_versions_are_still_found(cache):
    """The key and the ids of a file written before rows were encoded together."""
    rows = [("the film is good", "yes"), ("a very bad film", "no")]
    encode_rows(words(), rows, "seq2seq", 16)
    (file,) = lora_ga.data.encoding.cache_folder("tokens").iterdir()
    stored = load_file(file)
    assert file.name == "96f16a1aae0433d0d22113bb.safetensors"
    assert stored["ids"].tolist() == [3, 4, 5, 6, 1, 10, 1, 8, 9, 7, 4, 1, 11, 1]


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
