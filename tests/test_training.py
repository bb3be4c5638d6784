"""A training step is what the formulas say, whatever the accumulation, and what went wrong in it is told.

The reference is a loop of ten lines on torch's own AdamW, clipping and transformers' cosine schedule.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraModel, LoraConfig
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from lora_ga.adapters import adapter_pairs, attach_lora
from lora_ga.data.encoding import IGNORED, EncodedRows, LengthBucketSampler
from lora_ga.errors import SetupError
from lora_ga.losses import mean_token_loss, scored_logits
from lora_ga.methods.adalora import AdaLora, ranks
from lora_ga.methods.base import Method, Setup
from lora_ga.methods.full_ft import FullFinetune
from lora_ga.methods.lora import Lora
from lora_ga.optim.steps import AdamW, LoraPlus
from lora_ga.training import Diverged, Resume, TrainSettings, check_start, movement, train

ARCHITECTURES = ["causal", "seq2seq"]


@pytest.fixture
def setup(targets):
    return lambda architecture="causal", steps=6: Setup(targets[architecture], dict, seed=0, total_steps=steps)


@pytest.fixture
def trained(tiny, setup, collators, random_rows, tmp_path):
    """trained(method, **settings): the model after training on 48 rows, its result, and what moved."""

    def run(method, architecture="causal", rows=48, seed=0, **settings):
        chosen = TrainSettings(
            **{
                "learning_rate": 1e-2,
                "global_batch_size": 8,
                "per_device_train_batch_size": 8,
                "warmup_ratio": 0.3,
                **settings,
            }
        )
        model = method.prepare(tiny(architecture, dropout=0.0), setup(architecture, chosen.total_steps(rows)))
        result, moved = train(
            model,
            EncodedRows(random_rows(rows)),
            collators[architecture],
            method,
            chosen,
            resume=Resume(tmp_path),
            seed=seed,
        )
        return model, result, moved

    return run


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def column(result, name):
    return [row[name] for row in result.loss_curve]


# Accumulation


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    # Adam turns the rounding of a vanishing gradient into a whole step; its eps is raised above that.
    "method",
    [FullFinetune(steps=AdamW(eps=1e-5)), Lora(r=4, steps=AdamW(eps=1e-5))],
    ids=["full_ft", "lora"],
)
def test_accumulation_is_the_same_step(trained, random_rows, method, architecture):
    lengths = {len(row.target) for row in random_rows(48)}
    assert len(lengths) > 3  # equal targets would hide a mean of means
    whole, reference, _ = trained(method, architecture)
    assert len(reference.loss_curve) == 6
    for part in (1, 2, 4):
        model, result, _ = trained(method, architecture, per_device_train_batch_size=part)
        for name in ("step", "loss", "learning_rate", "grad_norm", "tokens"):
            assert column(result, name) == pytest.approx(column(reference, name), rel=1e-4), name
        after = weights(whole)
        for name, weight in weights(model).items():
            torch.testing.assert_close(weight, after[name], rtol=1e-4, atol=1e-5, msg=name)


def reference_loop(model, rows, collator, settings, seed):
    """The same training without Trainer: returns losses, rates and gradient norms of each step."""
    sampler = LengthBucketSampler(rows.lengths(), settings.global_batch_size, seed)
    order, size = list(sampler), settings.global_batch_size
    batches = [collator([rows[i] for i in order[start : start + size]]) for start in range(0, len(order), size)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.learning_rate,
                                  weight_decay=settings.weight_decay)  # fmt: skip
    warmup = math.ceil(settings.warmup_ratio * len(batches))
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))
    seen = []
    for batch in batches:
        labels = batch["labels"]
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        seen.append((loss.item(), schedule.get_last_lr()[0], norm.item()))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return [list(values) for values in zip(*seen, strict=True)]


@pytest.mark.parametrize("clip", [1.0, 1e-6])
def test_loss_rate_and_clipping_are_the_formulas(trained, tiny, setup, random_rows, collators, clip):
    model, result, _ = trained(Lora(r=4), max_grad_norm=clip, weight_decay=0.1)
    settings = TrainSettings(
        learning_rate=1e-2, global_batch_size=8, warmup_ratio=0.3, max_grad_norm=clip, weight_decay=0.1
    )
    other = Lora(r=4).prepare(tiny(dropout=0.0), setup()).train()
    losses, rates, norms = reference_loop(other, EncodedRows(random_rows(48)), collators["causal"], settings, 0)
    assert column(result, "loss") == pytest.approx(losses, rel=1e-4)
    assert column(result, "learning_rate") == pytest.approx(rates, rel=1e-9)
    assert column(result, "grad_norm") == pytest.approx(norms, rel=1e-3)
    assert rates[0] == 0 and max(rates) == 1e-2 and rates[-1] < 1e-2
    expected = weights(other)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_clipping_changes_the_weights(trained):
    free, tight = (trained(Lora(r=4), max_grad_norm=clip)[0] for clip in (1e3, 1e-8))
    assert not all(torch.allclose(a, b) for a, b in zip(weights(free).values(), weights(tight).values(), strict=True))


def test_same_seed_same_curve_other_seed_other_curve(trained):
    first, again, other = (trained(Lora(r=4), seed=seed)[1] for seed in (0, 0, 1))
    assert column(first, "loss") == column(again, "loss")
    assert column(first, "loss") != column(other, "loss")


def test_cost_counts_what_trains(trained):
    model, result, moved = trained(Lora(r=4))
    expected = sum(pair.lora_A.numel() + pair.lora_B.numel() for pair in adapter_pairs(model))
    assert result.trainable_parameters == expected
    assert result.optimizer_state_mb == pytest.approx(2 * 4 * expected / 2**20, rel=0.01)  # two float32 moments
    assert moved == {"trainable_tensors": 2 * len(adapter_pairs(model)), "unmoved": 0}


@pytest.mark.parametrize(("rows", "steps"), [(48, 6), (41, 6), (8, 1), (3, 1)])
def test_a_last_part_of_a_batch_is_a_step(trained, rows, steps):
    _, result, _ = trained(FullFinetune(), rows=rows)
    assert column(result, "step") == list(range(1, steps + 1))


# Logits at the scored positions


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scored_logits_are_the_full_logits_at_the_labels(tiny, targets, random_rows, collators, architecture, wrapped):
    model = tiny(architecture)
    if wrapped:
        config = LoraConfig(r=4, target_modules=list(targets[architecture]), init_lora_weights=False)
        model = attach_lora(model, config, 0).eval()
    batch = collators[architecture](random_rows(6))
    with torch.no_grad():
        found, labels = scored_logits(model, batch)
        full = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        mask = batch["labels"] != IGNORED
        loss = F.cross_entropy(full.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
        assert found.shape == (int(mask.sum()), full.shape[-1]) and mask.sum() < mask.numel()
        torch.testing.assert_close(found, full[mask], rtol=1e-5, atol=1e-5)
        assert torch.equal(labels, batch["labels"][mask])
        torch.testing.assert_close(mean_token_loss(model, batch), loss)
        # No hook stays behind: all positions are there again.
        assert model(**{key: value for key, value in batch.items() if key != "labels"}).logits.shape == full.shape


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_transformers(tiny, random_rows, collators, architecture):
    """Our labels are shifted already; transformers shifts a causal model's own, and T5's decoder inputs."""
    model, rows = tiny(architecture), random_rows(6)
    batch = collators[architecture](rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if architecture == "causal":
        width = max(len(row.prompt) + len(row.target) for row in rows)
        pad = [width - len(row.prompt) - len(row.target) for row in rows]
        zipped = list(zip(rows, pad, strict=True))
        inputs = {
            "input_ids": torch.tensor([[*row.prompt, *row.target, *[0] * n] for row, n in zipped]),
            "attention_mask": torch.tensor([[1] * (width - n) + [0] * n for n in pad]),
        }
        labels = torch.tensor([[*[IGNORED] * len(r.prompt), *r.target, *[IGNORED] * n] for r, n in zipped])
    else:
        labels = batch["labels"]
    model.requires_grad_(True)
    parameters = list(model.parameters())
    found, expected = mean_token_loss(model, batch), model(**inputs, labels=labels).loss
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (found, expected))
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# AdaLoRA and LoRA+ through the trainer


def test_adaloras_rank_shrinks_to_the_budget(trained):
    model, result, _ = trained(AdaLora(r=2, init_r=4), rows=80, warmup_ratio=0.0)
    layers = len([1 for name, _ in model.named_parameters() if "lora_E" in name])
    assert len(result.loss_curve) == 10
    assert ranks(model) == (2 * layers, 4 * layers)


def test_a_schedule_that_does_nothing_is_noticed(trained, monkeypatch):
    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", lambda self, step: None)
    with pytest.raises(RuntimeError, match="rank did not shrink"):
        trained(AdaLora(r=2, init_r=4), rows=80, warmup_ratio=0.0)


def test_the_recorded_loss_leaves_the_penalty_out(trained):
    plain, weighed = (trained(AdaLora(r=2, init_r=4, orth_reg_weight=weight), rows=80)[1] for weight in (0.0, 100.0))
    assert column(plain, "loss")[0] == pytest.approx(column(weighed, "loss")[0], rel=1e-6)
    assert column(weighed, "grad_norm")[0] > 10 * column(plain, "grad_norm")[0]


def test_lora_plus_rates_differ_by_16_all_the_way(trained, monkeypatch):
    """Seen after each step of the optimizer, so the schedule has moved both groups."""
    plain, seen = LoraPlus.optimizer, []

    def watched(self, model, **settings):
        optimizer = plain(self, model, **settings)
        names = {id(parameter): name.split(".")[-3] for name, parameter in model.named_parameters()}

        def look(optimizer, *args):
            seen.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})

        optimizer.register_step_post_hook(look)
        return optimizer

    monkeypatch.setattr(LoraPlus, "optimizer", watched)
    trained(Lora(r=4, steps=LoraPlus()))
    assert len(seen) == 6 and max(rate["lora_A"] for rate in seen) == pytest.approx(1e-2)
    assert all(rate["lora_B"] == pytest.approx(16 * rate["lora_A"]) for rate in seen)


# What must not pass in silence


@dataclass(frozen=True, kw_only=True)
class Breaks(Lora):
    """After its third step, one weight is no number any more."""

    value: float

    def after_step(self, model, step):
        if step == 3:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_with_its_curve(trained, value):
    with pytest.raises(Diverged, match="at step 4") as caught:
        trained(Breaks(r=4, value=value))
    assert [row["step"] for row in caught.value.curve] == [1, 2, 3]
    assert all(math.isfinite(number) for row in caught.value.curve for number in row.values())


def factors(model, name):
    return {key: p for key, p in model.named_parameters() if p.requires_grad and name in key}


def test_movement_reports_and_refuses(tiny, setup):
    model = Lora(r=4).prepare(tiny(), setup())
    before = weights(model)
    before = {name: value.flatten()[:4096] for name, value in before.items()}
    with pytest.raises(RuntimeError, match="where they were"):
        movement(before, model)
    with torch.no_grad():
        for parameter in factors(model, "lora_B").values():
            parameter += 1
    assert movement(before, model) == {"trainable_tensors": 28, "unmoved": 14}  # the lora_A may stand still
    name, parameter = list(factors(model, "lora_B").items())[5]
    with torch.no_grad():
        parameter -= 1
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        movement(before, model)


def test_training_that_moves_nothing_is_refused(trained):
    with pytest.raises(RuntimeError, match="where they were"):
        trained(FullFinetune(), learning_rate=1e-30)


@dataclass(frozen=True, kw_only=True)
class Mover(Method):
    """Says that it keeps the function, or that it moves it."""


@dataclass(frozen=True, kw_only=True)
class Shifter(Method):
    step0 = "shift"


def test_check_start_holds_both_promises():
    before = torch.randn(5, 7)
    same, other = before + 1e-6, before + 0.1
    assert check_start(Mover(), before, same)["max_abs_logit_difference"] < 1e-5
    assert check_start(Shifter(), before, other)["promise"] == "shift"
    with pytest.raises(RuntimeError, match="promised identity"):
        check_start(Mover(), before, other)
    with pytest.raises(RuntimeError, match="promised shift"):
        check_start(Shifter(), before, copy.copy(before))


def test_check_start_does_not_take_nan_for_identity():
    before = torch.randn(5, 7)
    with pytest.raises(RuntimeError):
        check_start(Mover(), before, before * math.nan)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch_size": 10, "per_device_train_batch_size": 4}, "not a multiple"),
        ({"per_device_train_batch_size": 0}, "positive"),
        ({"global_batch_size": 0}, "positive"),
        ({"max_steps": 0}, "positive"),
        ({"max_steps": -3}, "positive"),
        ({"num_train_epochs": 0}, "positive"),
        ({"learning_rate": -1e-4}, "positive"),
        ({"autocast": "float16"}, "bfloat16"),
        ({"lr_scheduler_type": "cosin"}, "cosine"),
        ({"warmup_ratio": 3}, "warmup_ratio"),
    ],
    ids=str,
)
def test_impossible_budgets_are_refused(settings, message):
    with pytest.raises(SetupError, match=message):
        TrainSettings(**{"learning_rate": 1e-3, **settings}).check()
