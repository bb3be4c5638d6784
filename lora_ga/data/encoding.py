"""Rows to token ids and batches, for causal models (loss on the target only) and for T5 (labels masked at padding).

Causal text is prompt + " " + target + eos, as in LoRA-GA's, LoRA-Pro's and LoRA-One's data.py. Ids are cached under a
hash of every text, the tokenizer and the length limit. Differs in: T5 labels are masked at padding, where LoRA-GA's
SeqToSeqEncode lets pad tokens count in the loss by default.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lora_ga.cache import cache_folder
from lora_ga.records import content_hash

Architecture = Literal["causal", "seq2seq"]
IGNORED = -100
TEXTS = 1000  # rows encoded at once: enough to keep the tokenizer's threads busy, little enough for a bar that moves


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row; the target ends with eos."""

    prompt: list[int]
    target: list[int]


class EncodedRows(Dataset):
    """Encoded rows as a torch dataset."""

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedRow:
        return self.rows[index]

    def lengths(self) -> list[int]:
        """Tokens of each row, prompt and target."""
        return [len(row.prompt) + len(row.target) for row in self.rows]


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, str]], architecture: Architecture, max_length: int
) -> list[EncodedRow]:
    """Encode (prompt, target) rows in one call; a prompt that is too long loses its end, the target is kept.

    The causal target is what prompt + " " + target has beyond the prompt's own tokens, so that a tokenizer that marks
    word starts sees the text a reader would.
    """
    eos = tokenizer.eos_token_id
    prompts, targets = [prompt for prompt, _ in rows], [target for _, target in rows]
    if architecture == "seq2seq":
        sources = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        answers = tokenizer(targets, add_special_tokens=False)["input_ids"]
        return [
            EncodedRow([*source[: max_length - 1], eos], [*answer, eos])
            for source, answer in zip(sources, answers, strict=True)
        ]
    wholes = tokenizer([f"{prompt} {target}" for prompt, target in rows])["input_ids"]
    encoded = []
    for alone, whole in zip(tokenizer(prompts)["input_ids"], wholes, strict=True):
        shared = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
        answer = [*whole[shared:], eos]
        encoded.append(EncodedRow(whole[:shared][: max(1, max_length - len(answer))], answer))
    return encoded


def encode_row(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, architecture: Architecture, max_length: int
) -> EncodedRow:
    """Encode one row."""
    return encode_texts(tokenizer, [(prompt, target)], architecture, max_length)[0]


def tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> object:
    """All that decides a text's ids: vocabulary, merges, normaliser, splitting; the vocabulary alone for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    rules = json.loads(backend.to_str())
    return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}  # of the last call


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[str, str]],
    architecture: Architecture,
    max_length: int,
    *,
    cache: bool = True,
) -> list[EncodedRow]:
    """Encode (prompt, target) rows, from the cache if these texts were encoded with this tokenizer before."""
    rules = tokenizer_rules(tokenizer)
    key = content_hash([list(rows), architecture, max_length, rules, tokenizer.eos_token_id], 24)
    path = cache_folder("tokens", f"{key}.safetensors")
    if cache and path.exists():
        stored = load_file(path)
        ids, lengths = stored["ids"].tolist(), stored["lengths"].tolist()
        encoded, start = [], 0
        for prompt, target in lengths:
            encoded.append(EncodedRow(ids[start : start + prompt], ids[start + prompt : start + prompt + target]))
            start += prompt + target
        return encoded
    encoded = []
    with tqdm(total=len(rows), desc="tokenise", unit="row", leave=False, disable=len(rows) < 5000) as bar:
        for start in range(0, len(rows), TEXTS):
            encoded += encode_texts(tokenizer, rows[start : start + TEXTS], architecture, max_length)
            bar.update(len(encoded) - bar.n)
    if cache:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        flat = [token for row in encoded for token in (*row.prompt, *row.target)]
        save_file(
            {
                "ids": torch.tensor(flat, dtype=torch.int32),
                "lengths": torch.tensor([[len(row.prompt), len(row.target)] for row in encoded], dtype=torch.int32),
            },
            temporary,
        )
        temporary.replace(path)
    return encoded


def _pad(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[value] * (width - len(sequence))] for sequence in sequences])  # (batch, width)


@dataclass(frozen=True)
class Collator:
    """Rows to a batch padded on the right to its longest row.

    The batch has input_ids, attention_mask (batch, length), for T5 decoder_input_ids too, and labels: the next token at
    each position of the output (already shifted), IGNORED where none is scored.
    """

    architecture: Architecture
    pad_token_id: int
    decoder_start_token_id: int | None = None

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        if self.architecture == "seq2seq":
            inputs = [row.prompt for row in rows]
            labels = [row.target for row in rows]
            start = self.decoder_start_token_id
            extra = {"decoder_input_ids": _pad([[start, *row.target[:-1]] for row in rows], self.pad_token_id)}  # type: ignore[list-item]
        else:
            # The last token is only ever a label, so it need not be read.
            inputs = [[*row.prompt, *row.target[:-1]] for row in rows]
            labels = [[*[IGNORED] * (len(row.prompt) - 1), *row.target] for row in rows]
            extra = {}
        return {
            "input_ids": _pad(inputs, self.pad_token_id),
            "attention_mask": _pad([[1] * len(row) for row in inputs], 0),
            "labels": _pad(labels, IGNORED),
            **extra,
        }


class LengthBucketSampler(Sampler[int]):
    """Every row once an epoch, rows of like length together, batches in random order.

    Shuffled rows are sorted by length within chunks of `chunk` batches, then whole batches are shuffled: transformers'
    own sampler leaves each chunk running from long to short, a curriculum nobody asked for.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, chunk: int = 50) -> None:
        self.lengths, self.batch_size, self.seed, self.chunk = list(lengths), batch_size, seed, chunk
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another order for another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        span = self.batch_size * self.chunk
        ordered = [
            index
            for start in range(0, len(order), span)
            for index in sorted(order[start : start + span], key=lambda i: self.lengths[i])
        ]
        batches = [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]
        last = batches.pop() if len(batches[-1]) < self.batch_size else []
        for position in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[position]
        yield from last


class WithBlank(Dataset):
    """Rows, and at the index after the last a row that scores nothing, for ranks that the last batch leaves empty."""

    def __init__(self, rows: EncodedRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedRow:
        return self.rows[index] if index < len(self.rows) else EncodedRow([0], [IGNORED])


class RankBatches(Sampler[list[int]]):
    """This rank's micro-batches of every global batch, so that ranks x accumulation x micro-batch give the same step.

    A last global batch that is too small for all ranks is filled up with the blank row's index (see `WithBlank`).
    """

    def __init__(self, order: LengthBucketSampler, micro_batch: int, rank: int = 0, ranks: int = 1) -> None:
        if order.batch_size % (micro_batch * ranks):
            raise ValueError(f"{ranks} ranks x {micro_batch} rows do not divide a global batch of {order.batch_size}")
        self.order, self.micro_batch, self.rank, self.ranks = order, micro_batch, rank, ranks

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / (self.micro_batch * self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.order)
        together = self.micro_batch * self.ranks
        for start in range(0, len(order), together):
            rows = order[start : start + together]
            if self.ranks > 1:
                rows += [len(order)] * (together - len(rows))
            yield rows[self.rank * self.micro_batch : (self.rank + 1) * self.micro_batch]
