"""The loss on rows that are not trained on: what it is, when it is measured, and that measuring it changes nothing."""

from __future__ import annotations

import pytest
import torch

from lora_ga.data.encoding import EncodedRows
from lora_ga.errors import SetupError
from lora_ga.losses import held_out_loss, scored_logits
from lora_ga.methods.base import Setup
from lora_ga.methods.lora import Lora
from lora_ga.training import Resume, TrainSettings, train

ARCHITECTURES = ["causal", "seq2seq"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_it_is_the_mean_over_all_tokens_whatever_the_batch(tiny, collators, random_rows, architecture, batch_size):
    model, rows, collator = tiny(architecture), random_rows(10), collators[architecture]
    sums, tokens = 0.0, 0
    for row in rows:
        logits, labels = scored_logits(model, collator([row]))
        sums += float(-torch.log_softmax(logits.double(), -1)[torch.arange(len(labels)), labels].sum())
        tokens += len(labels)
    found = held_out_loss(model, rows, collator, batch_size=batch_size)
    assert found == pytest.approx(sums / tokens, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was_and_dropout_is_off(tiny, collators, random_rows, training):
    model = tiny("seq2seq", dropout=0.5).train(training)
    first, again = (held_out_loss(model, random_rows(4), collators["seq2seq"], batch_size=2) for _ in range(2))
    assert first == again
    assert model.training is training


@pytest.fixture
def curve(tiny, targets, collators, random_rows, tmp_path):
    """curve(held_out, **settings): the loss curve of six steps of LoRA."""

    def run(held_out, **settings):
        chosen = TrainSettings(learning_rate=1e-2, global_batch_size=4, per_device_train_batch_size=4, **settings)
        model = Lora(r=2, lora_alpha=4).prepare(tiny("seq2seq"), Setup(targets["seq2seq"], dict, seed=0, total_steps=6))
        measure = None
        if held_out:

            def measure():
                return held_out_loss(model, random_rows(8, seed=7), collators["seq2seq"], batch_size=8)

        result, _ = train(
            model,
            EncodedRows(random_rows(24)),
            collators["seq2seq"],
            Lora(r=2, lora_alpha=4),
            chosen,
            resume=Resume(tmp_path),
            seed=0,
            held_out=measure,
        )
        return result.loss_curve

    return run


def test_it_is_measured_every_so_many_steps_and_after_the_last(curve):
    rows = curve(True, held_out_every=4)
    assert [row["step"] for row in rows if "held_out_loss" in row] == [4, 6]


def test_measuring_it_does_not_change_the_training(curve):
    """Dropout is on here, so a draw too many would show."""
    with_it, without = curve(True, held_out_every=1), curve(False)
    assert [row["loss"] for row in with_it] == [row["loss"] for row in without]
    assert all("held_out_loss" in row for row in with_it)


# Warm-up by steps


def test_warmup_steps_replace_the_ratio(curve):
    rates = [row["learning_rate"] for row in curve(False, warmup_steps=3)]
    assert rates[:4] == pytest.approx([0.0, 1e-2 / 3, 2e-2 / 3, 1e-2])


def test_a_warmup_that_would_not_end_is_refused():
    settings = TrainSettings(learning_rate=1e-3, global_batch_size=4, per_device_train_batch_size=4, warmup_steps=100)
    with pytest.raises(SetupError, match=r"train.warmup_steps=100 of 6 steps"):
        settings.total_steps(24)
    assert settings.total_steps(4000) == 1000
