"""Alignment and captured energy are what dense autograd says, whatever the method, and measuring changes no bit."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_ga.alignment
from lora_ga.adapters import adapter_pairs, target_linears
from lora_ga.alignment import Alignment, captured_energy, product_change
from lora_ga.data.encoding import IGNORED, EncodedRows, LengthBucketSampler
from lora_ga.errors import SetupError
from lora_ga.gradients import estimate_gradients
from lora_ga.losses import mean_token_loss, scored_logits
from lora_ga.methods.base import Setup
from lora_ga.methods.full_ft import FullFinetune
from lora_ga.methods.lora import Lora
from lora_ga.methods.lora_ga import LoraGA, lora_ga_factors
from lora_ga.methods.svd import EXACT
from lora_ga.optim.lora_pro import adjust
from lora_ga.optim.steps import LoraPro, Steps
from lora_ga.training import Diverged, Resume, TrainSettings, train

# The tangent space


@st.composite
def problems(draw):
    """G (d_out, d_in), lora_A and lora_B of rank r with 2r <= both sides, in float64."""
    r = draw(st.integers(1, 3))
    d_out, d_in = draw(st.integers(2 * r, 9)), draw(st.integers(2 * r, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = (d_out, d_in), (r, d_in), (d_out, r)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def dense_captured(G, A, B):
    """|projection of G|^2, by least squares over all X, Y of B X + Y A."""
    basis = np.hstack([np.kron(B, np.eye(G.shape[1])), np.kron(np.eye(G.shape[0]), A.mT)])
    solution = np.linalg.lstsq(basis, G.reshape(-1).numpy(), rcond=1e-7)[0]
    return float(np.square(basis @ solution).sum())


@given(problems(), st.sampled_from(["whole", "B = 0", "one direction", "repeated"]))
@settings(deadline=None, max_examples=60)
def test_captured_is_the_projection_on_the_tangent_space(case, kind):
    G, A, B = case
    if kind == "B = 0":
        B = torch.zeros_like(B)
    elif kind == "one direction":
        A, B = A[:1].expand_as(A), B[:, :1] * torch.arange(1, A.shape[0] + 1)
    elif kind == "repeated":  # a direction that rounding keeps apart by less than float32 can tell
        A = torch.cat([A, A[:1] + 1e-12])
        B = torch.cat([B, B[:, :1] - 1e-12], dim=1)
    assert float(captured_energy(G, A, B)) == pytest.approx(dense_captured(G, A, B), rel=1e-6)


@given(problems())
@settings(deadline=None, max_examples=30)
def test_where_b_is_zero_only_the_rows_of_a_are_reached(case):
    G, A, B = case
    P_A = A.mT @ torch.linalg.inv(A @ A.mT) @ A
    assert float(captured_energy(G, A, 0 * B)) == pytest.approx(float((G @ P_A).square().sum()), rel=1e-9)


@given(problems(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_lora_ga_starts_where_the_most_is_captured(case, seed):
    G, A, B = case
    r = A.shape[0]
    best = float(torch.linalg.svdvals(G)[: 2 * r].square().sum())
    assert float(captured_energy(G, *lora_ga_factors(G, r, 2.0, svd=EXACT))) == pytest.approx(best, rel=1e-9)
    assert float(captured_energy(G, A, B)) <= best * (1 + 1e-9)


@given(problems(), st.sampled_from([2.0, 0.5]))
@settings(deadline=None, max_examples=30)
def test_small_steps_of_lora_pro_reach_the_bound_and_loras_do_not_pass_it(case, s):
    """One step of gradient descent on the factors: cosine^2 = captured along `adjust`, no more along LoRA's own."""
    G, A, B = case
    bound = float(captured_energy(G, A, B) / G.square().sum()) ** 0.5

    def cosine(g_A, g_B):
        lr = 1e-7 / max(float(g_A.norm()), float(g_B.norm()))
        change = s * product_change(A, B, A - lr * g_A, B - lr * g_B)
        return -float((G * change).sum() / (G.norm() * change.norm()))

    own = s * B.mT @ G, s * G @ A.mT
    assert cosine(*adjust(A, B, *own, s, delta=0.0)) == pytest.approx(bound, rel=1e-4)
    assert cosine(*own) <= bound * (1 + 1e-4)


# Training


@dataclass(frozen=True, kw_only=True)
class PlainSGD(Steps):
    def optimizer(self, model, *, learning_rate, weight_decay):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)


METHODS = {
    "full_ft": FullFinetune(),
    "lora": Lora(r=4),
    "lora_ga": LoraGA(r=4),
    "lora_pro": Lora(r=4, steps=LoraPro()),
}
STEPS = 6


def effective(model, names):
    """The weight of every target as the forward pass uses it, float64."""
    pairs = {pair.name: pair for pair in adapter_pairs(model)}
    if not pairs:
        return {name: model.get_submodule(name).weight.detach().double() for name in names}
    found = {}
    for name, pair in pairs.items():
        found[name] = pair.base.weight.detach().double()
        for active in pair.layer.active_adapters:
            A, B = (factors[active].weight.detach().double() for factors in (pair.layer.lora_A, pair.layer.lora_B))
            found[name] = found[name] + pair.layer.scaling[active] * B @ A
    return found


@dataclass
class Seen:
    """A training's curve, its model, and after each step (first: before any) all weights and the adapters' factors."""

    curve: list
    model: torch.nn.Module
    weights: list
    factors: list

    def column(self, name):
        return [row.get(name) for row in self.curve]


@pytest.fixture
def trained(tiny, targets, collators, random_rows, tmp_path):
    """trained(method, **settings): six steps on 48 rows."""

    def run(method, architecture="causal", *, measure=True, full_precision=True, dropout=0.0, **changes):
        kept = {"learning_rate": 1e-2, "global_batch_size": 8, "per_device_train_batch_size": 8, "warmup_ratio": 0.0}
        model, rows = tiny(architecture, dropout=dropout), EncodedRows(random_rows(48))
        names = target_linears(model, targets[architecture])
        batches = [collators[architecture](rows.rows[:8])]

        def gradients(k):
            return estimate_gradients(model, batches, names, mean_token_loss, seed=0)

        setup = Setup(targets[architecture], gradients, seed=0, total_steps=6, full_precision=full_precision)
        model = method.prepare(model, setup)
        seen = Seen([], model, [], [])

        def look():
            seen.weights.append(effective(model, names))
            seen.factors.append({p.name: (p.lora_A.detach().double(), p.lora_B.detach().double())
                                 for p in adapter_pairs(model)})  # fmt: skip
            return False

        look()
        alignment = Alignment(model, targets[architecture]) if measure else None
        result, _ = train(
            model, rows, collators[architecture], method, TrainSettings(**{**kept, "alignment_every": 1, **changes}),
            seed=0, resume=Resume(tmp_path, stop=look), alignment=alignment,
        )  # fmt: skip
        look()
        seen.curve = result.loss_curve
        return seen

    return run


def by_autograd(model, weights, batch):
    """The weight gradients of a plain model with these weights."""
    model = model.double().requires_grad_(True)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED).backward()
    return {name: model.get_submodule(name).weight.grad for name in weights}


@pytest.mark.parametrize("exact_start", [True, False], ids=["folded", "offset adapter"])
@pytest.mark.parametrize("method", ["lora", "lora_ga", "lora_pro"])
@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
def test_each_step_is_measured_as_the_dense_formulas(
    trained, tiny, collators, random_rows, architecture, method, exact_start
):
    seen = trained(METHODS[method], architecture, full_precision=exact_start)
    rows = EncodedRows(random_rows(48))
    order = list(LengthBucketSampler(rows.lengths(), 8, 0))
    for step in range(6):
        batch = collators[architecture]([rows[i] for i in order[8 * step : 8 * step + 8]])
        G = by_autograd(tiny(architecture, dropout=0.0), seen.weights[step], batch)
        change = torch.cat([(seen.weights[step + 1][n] - seen.weights[step][n]).flatten() for n in G])
        flat = torch.cat([G[n].flatten() for n in G])
        row = seen.curve[step]
        assert row["alignment"] == pytest.approx(-float(F.cosine_similarity(flat, change, dim=0)), rel=1e-3, abs=1e-4)
        outside = 0.0
        for name, (A, B) in seen.factors[step].items():
            of_A, of_B = torch.linalg.pinv(A, rtol=1e-6) @ A, B @ torch.linalg.pinv(B, rtol=1e-6)
            outside += float((G[name] - of_B @ G[name] - G[name] @ of_A + of_B @ G[name] @ of_A).square().sum())
        assert row["captured"] == pytest.approx(1 - outside / float(flat.square().sum()), rel=1e-3)
        assert 0 < row["captured"] < 1


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
def test_gradient_descent_on_the_weights_follows_the_gradient_wholly(trained, architecture):
    seen = trained(FullFinetune(steps=PlainSGD()), architecture)
    assert seen.column("alignment") == pytest.approx([1.0] * 6, abs=1e-4)
    assert seen.column("captured") == [1.0] * 6


def test_adam_on_the_weights_does_not(trained):
    seen = trained(METHODS["full_ft"])
    assert all(0 < value < 0.99 for value in seen.column("alignment")) and seen.column("captured") == [1.0] * 6


@pytest.mark.parametrize("part", [1, 2, 4])
@pytest.mark.parametrize("name", ["full_ft", "lora_ga"])
def test_accumulation_is_the_same_measure(trained, name, part):
    """Gradient descent: Adam would turn the rounding of a vanishing gradient into a whole step."""
    method = replace(METHODS[name], steps=PlainSGD())
    whole, parts = trained(method), trained(method, per_device_train_batch_size=part)
    for column in ("alignment", "captured"):
        assert parts.column(column) == pytest.approx(whole.column(column), rel=1e-3)


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
@pytest.mark.parametrize("name", METHODS)
def test_measuring_changes_no_bit(trained, name, architecture):
    """With dropout, where the model has some, and accumulation."""
    options = {"dropout": 0.1, "per_device_train_batch_size": 4, "alignment_every": 2}
    plain = trained(METHODS[name], architecture, measure=False, **options)
    seen = trained(METHODS[name], architecture, **options)
    for column in ("loss", "grad_norm", "tokens"):
        assert seen.column(column) == plain.column(column)
    trained_by = dict(plain.model.named_parameters())
    assert all(torch.equal(p, trained_by[n]) for n, p in seen.model.named_parameters())
    assert all(p.grad is None for p in seen.model.parameters() if not p.requires_grad)
    assert not any(module._forward_hooks for module in seen.model.modules())
    assert [row["step"] for row in seen.curve if "captured" in row] == [1, 2, 4, 6]
    assert not any("captured" in row or "alignment" in row for row in plain.curve)


def test_a_step_that_moves_nothing_has_no_alignment(trained):
    seen = trained(METHODS["lora"], warmup_ratio=0.3)
    assert seen.curve[0]["learning_rate"] == 0
    assert "alignment" not in seen.curve[0] and 0 < seen.curve[0]["captured"] < 1
    assert all("alignment" in row for row in seen.curve[1:])


def test_a_loss_that_is_not_finite_leaves_no_hook(trained, monkeypatch):
    models = []

    def infinite(model, inputs, autocast, head):
        models.append(head)
        logits, labels = scored_logits(model, inputs, autocast, head)
        return logits * torch.inf, labels

    monkeypatch.setattr("lora_ga.trainer.scored_logits", infinite)
    with pytest.raises(Diverged):
        trained(METHODS["lora"])
    assert models and not any(module._forward_hooks for module in models[0].modules())


def test_its_seconds_are_not_the_trainings(trained, monkeypatch):
    """A clock that only measuring moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(function, seconds):
        def timed(*arguments):
            now[0] += seconds
            return function(*arguments)

        return timed

    monkeypatch.setattr(lora_ga.alignment, "captured_energy", slow(captured_energy, 100.0))
    monkeypatch.setattr(lora_ga.alignment._Target, "values", slow(lora_ga.alignment._Target.values, 10.0))
    seen = trained(METHODS["lora"])
    assert now[0] > 1000 and seen.column("seconds") == [0.0] * 6


@pytest.mark.parametrize("every", [0, -1])
def test_never_is_null(every):
    with pytest.raises(SetupError, match=f"alignment_every={every}: use a number of steps, or null"):
        TrainSettings(learning_rate=1e-3, alignment_every=every).check()
