"""Proves, with models rigged to answer in known ways, that right answers score 1.0, wrong ones 0.0, and constant or
empty ones the base rate with no exact match."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eval.base import classification_metrics
from eval.glue import classify

PAIR = ["yes", "no"]


class Table(nn.Module):
    """A model that looks at the last token alone: its output layer says which token follows which."""

    def __init__(self, follows: dict[int, int], otherwise: int, vocab: int = 100) -> None:
        super().__init__()
        self.head = nn.Linear(vocab, vocab, bias=False)
        self.vocab = vocab
        with torch.no_grad():
            self.head.weight.zero_()
            for token in range(vocab):
                self.head.weight[follows.get(token, otherwise), token] = 50.0

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.head(F.one_hot(input_ids, self.vocab).float()))


def _metrics(model, tokenizer, prompts, gold):
    result = classify(model, tokenizer, prompts, PAIR, gold, architecture="causal", max_length=64, batch_size=4)
    return {name: cell["value"] for name, cell in classification_metrics(result, gold, 2).items()}


@pytest.fixture
def canary(tokenizer):
    """Ten rows whose last word gives the answer away: w0 for yes (class 0), w1 for no (class 1)."""
    gold = [0, 1, 1, 0, 1, 1, 1, 0, 1, 1]
    prompts = [f"{'w5 ' * (i % 4)}w7 w{label}" for i, label in enumerate(gold)]
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("w0", "w1", "yes", "no")}
    return prompts, gold, ids


def test_canary_gold_always_wins(canary, tokenizer):
    prompts, gold, ids = canary
    model = Table({ids["w0"]: ids["yes"], ids["w1"]: ids["no"]}, otherwise=1)
    metrics = _metrics(model, tokenizer, prompts, gold)
    assert metrics["eval_loss"] == pytest.approx(0.0, abs=1e-6)
    assert [metrics[key] for key in ("accuracy", "f1", "matthews_correlation", "exact_match")] == [1.0] * 4


def test_canary_gold_always_loses(canary, tokenizer):
    prompts, gold, ids = canary
    model = Table({ids["w0"]: ids["no"], ids["w1"]: ids["yes"]}, otherwise=1)
    metrics = _metrics(model, tokenizer, prompts, gold)
    assert [metrics[key] for key in ("accuracy", "f1", "matthews_correlation", "exact_match")] == [0.0, 0.0, -1.0, 0.0]


def test_canary_constant_answer_is_the_base_rate(canary, tokenizer):
    """The model says "no no no ...": the prediction is class 1, and the text never ends, so no exact match."""
    prompts, gold, ids = canary
    metrics = _metrics(Table({}, otherwise=ids["no"]), tokenizer, prompts, gold)
    assert metrics["accuracy"] == 0.7 and metrics["exact_match"] == 0.0 and metrics["matthews_correlation"] == 0.0
    assert metrics["f1"] == pytest.approx(2 * 0.7 / 1.7)


def test_canary_empty_answer_is_the_base_rate(canary, tokenizer):
    """The model ends at once: both labels tie, the first is taken, and nothing matches."""
    prompts, gold, _ = canary
    metrics = _metrics(Table({}, otherwise=1), tokenizer, prompts, gold)
    assert metrics["accuracy"] == 0.3 and metrics["exact_match"] == 0.0 and metrics["matthews_correlation"] == 0.0
    assert math.isfinite(metrics["eval_loss"]) and metrics["eval_loss"] > 10


def test_canary_right_word_but_no_end_is_not_exact(canary, tokenizer):
    prompts, gold, ids = canary
    follows = {ids["w0"]: ids["yes"], ids["w1"]: ids["no"]}
    metrics = _metrics(Table(follows, otherwise=ids["w0"]), tokenizer, prompts, gold)
    assert metrics["accuracy"] == 1.0 and metrics["exact_match"] == 0.0
