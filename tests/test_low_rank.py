"""Gradients that are never formed: their factors against the whole matrix, pass by pass, and what they leave out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ga.adapters import target_linears
from lora_ga.gradients import cached_gradients, estimate_gradients
from lora_ga.losses import mean_token_loss
from lora_ga.low_rank import Exact, Incremental, LowRank, Sketch
from lora_ga.methods.lora_ga import lora_ga_factors
from lora_ga.methods.lora_one import lora_one_factors
from lora_ga.methods.svd import EXACT, TruncatedSVD

KINDS = {
    "incremental": lambda k: Incremental(k),
    "incremental, no iterations": lambda k: Incremental(k, power_iterations=0),
    "incremental, 3 iterations": lambda k: Incremental(k, power_iterations=3),
    "sketch": lambda k: Sketch(k),
    "sketch, 6 passes": lambda k: Sketch(k, passes=6),
}
# What is kept of the best rank-k energy where singular values hardly fall: one sketch alone has no power iteration.
LEAST = {
    "incremental": 0.95,
    "incremental, no iterations": 0.8,
    "incremental, 3 iterations": 0.99,
    "sketch": 0.8,
    "sketch, 6 passes": 0.98,
}
kinds = pytest.mark.parametrize("kind", KINDS)


def fed(accumulator, batches):
    """The sum of D^T X over batches (D, X), as the backward pass would hand them over."""
    D, X = batches[0]
    accumulator.begin({"layer": (D.shape[1], X.shape[1])})
    for _ in range(accumulator.passes):
        for D, X in batches:
            accumulator.add("layer", D, X)
        accumulator.end_pass()
    return accumulator.result()["layer"]


def decaying(d_out, d_in, decay, seed, batches=3, tokens=40):
    """Batches whose sum has singular values that fall by `decay` each."""
    generator = torch.Generator().manual_seed(seed)
    values = decay ** torch.arange(min(d_out, d_in)).float()
    U, V = (torch.linalg.qr(torch.randn(d, len(values), generator=generator))[0] for d in (d_out, d_in))
    made = []
    for _ in range(batches):
        code = torch.randn(tokens, len(values), generator=generator) / tokens**0.5
        made.append((code @ (U * values).mT, code @ V.mT))
    return made


def total(batches):
    return sum(D.double().mT @ X.double() for D, X in batches)


def captured(found, G, k):
    """Least share of the best rank-k energy of G that the leading k directions of the factors hold, left and right."""
    U, _, Vh = EXACT(found, k)
    best = torch.linalg.svdvals(G)[:k].square().sum()
    left, right = (U.double().mT @ G).square().sum(), (G @ Vh.double().mT).square().sum()
    return float(min(left, right) / best)


@kinds
@given(st.integers(1, 6), st.integers(8, 30), st.integers(8, 30), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_a_gradient_of_rank_k_is_kept_whole(kind, rank, d_out, d_in, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
    batches = []
    for _ in range(3):
        code = torch.randn(20, rank, generator=generator)
        batches.append((code @ left.mT, torch.randn(20, rank, generator=generator) @ right))
    found, G = fed(KINDS[kind](8), batches), total(batches)
    assert found.left.shape == (d_out, 8) and found.right.shape == (8, d_in)
    torch.testing.assert_close(found.dense().double(), G, rtol=0, atol=1e-4 * float(G.abs().max()))


@kinds
def test_factors_wider_than_the_layer_are_clipped_and_exact(kind):
    batches = decaying(10, 24, 0.9, seed=0)
    found = fed(KINDS[kind](64), batches)
    assert found.left.shape == (10, 10)
    torch.testing.assert_close(found.dense().double(), total(batches), rtol=0, atol=1e-5)


@kinds
@pytest.mark.parametrize("decay", [0.5, 0.8, 0.95])
def test_captures_the_leading_energy_and_never_more(kind, decay):
    batches = decaying(60, 48, decay, seed=1)
    found, G = fed(KINDS[kind](16), batches), total(batches)
    assert LEAST[kind] < captured(found, G, 8) <= 1 + 1e-6
    torch.testing.assert_close(found.left.mT @ found.left, torch.eye(16), rtol=0, atol=1e-5)


def test_more_passes_come_nearer():
    batches = decaying(80, 80, 0.97, seed=2)
    shares = [captured(fed(Sketch(12, passes=passes), batches), total(batches), 6) for passes in (2, 4, 8)]
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.995
    shares = [captured(fed(Incremental(12, power_iterations=i), batches), total(batches), 6) for i in (0, 1, 4)]
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.98


def test_each_batch_goes_on_from_what_is_kept():
    """Without iterations, the same gradient batch after batch is found as if one batch had had them."""
    batch = decaying(80, 80, 0.97, seed=2, batches=1)
    often = captured(fed(Incremental(12, power_iterations=0), 6 * batch), total(batch), 6)
    once, iterated = (captured(fed(Incremental(12, power_iterations=i), batch), total(batch), 6) for i in (0, 4))
    assert once < 0.85 < 0.95 < often and abs(often - iterated) < 0.03, (once, often, iterated)


def test_what_no_batch_had_before_is_found():
    """Batches whose rows and columns are orthogonal to all former ones, of the largest first."""
    generator = torch.Generator().manual_seed(8)
    U, V = (torch.linalg.qr(torch.randn(d, 12, generator=generator))[0] for d in (40, 48))
    batches = [(scale * U[:, part].mT, V[:, part].mT) for scale, part in ((10.0, slice(0, 6)), (1.0, slice(6, 12)))]
    found = fed(Incremental(12, power_iterations=0), batches)
    G = total(batches)
    torch.testing.assert_close(found.dense().double(), G, rtol=0, atol=1e-4 * float(G.abs().max()))


@kinds
def test_memory_is_that_of_the_factors(kind):
    d_out, d_in, k = 96, 80, 4
    accumulator = KINDS[kind](k)
    batches = decaying(d_out, d_in, 0.7, seed=3)
    fed(accumulator, batches)
    held = []
    for value in vars(accumulator).values():
        for item in value.values() if isinstance(value, dict) else ():
            held += [item.left, item.right] if isinstance(item, LowRank) else [item]
    elements = sum(item.numel() for item in held if isinstance(item, torch.Tensor))
    # and the random start, which all layers of a width share
    assert 0 < elements <= (d_out + 2 * d_in) * k < d_out * d_in / 7


def test_bfloat16_products_keep_the_directions():
    batches = [(D.bfloat16(), X) for D, X in decaying(60, 48, 0.7, seed=4)]
    for kind in KINDS.values():
        found = fed(kind(16), batches)
        assert found.left.dtype == found.right.dtype == torch.float32
        assert captured(found, total(batches), 8) > 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_adds_up_in_the_dtype_it_is_told(dtype):
    batches = decaying(20, 12, 0.8, seed=5)
    accumulator = Exact(dtype=dtype)
    found = fed(accumulator, batches)
    assert accumulator.total["layer"].dtype == dtype and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), total(batches), rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)


def test_singular_vectors_of_factors_are_those_of_their_product():
    found = fed(Incremental(16), decaying(30, 40, 0.8, seed=6))
    for mine, wanted in zip(EXACT(found, 8), EXACT(found.dense(), 8), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-4)
    for mine, wanted in zip(EXACT(-found, 8), EXACT(-found.dense(), 8), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="20 singular directions are wanted, and the factors have 16"):
        EXACT(found, 20)


def test_starts_from_factors_are_starts_from_the_matrix():
    found = fed(Incremental(TruncatedSVD(2).columns(8)), decaying(40, 48, 0.6, seed=7))
    for start in (lambda G: lora_ga_factors(G, 4, 2.0, svd=EXACT), lambda G: lora_one_factors(G, 4, svd=EXACT)):
        for mine, wanted in zip(start(found), start(found.dense()), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-4)
    A, B = lora_ga_factors(found, 4, 2.0, direction="gaussian")
    assert A.shape == (4, 48) and B.shape == (40, 4)


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
@kinds
def test_of_a_model_they_are_the_exact_gradients_directions(
    kind, architecture, tiny, targets, random_rows, collators, tmp_path
):
    """Dropout included: every pass over a batch draws the same masks."""
    model, seen = tiny(architecture), []
    layers = target_linears(model, targets[architecture])
    batches = [collators[architecture](random_rows(4, seed)) for seed in range(3)]

    def estimate(accumulator):
        return estimate_gradients(model, batches, layers, mean_token_loss, seed=0, accumulator=accumulator)

    exact, found = estimate(Exact()), estimate(KINDS[kind](12))
    for name, G in exact.items():
        seen.append(captured(found[name], G.double(), 4))
    assert min(seen) > LEAST[kind]
    key = {"kept": kind}
    again = [cached_gradients(key, tmp_path, lambda: found)[0] for _ in range(2)][1]
    assert all(torch.equal(again[name].dense(), found[name].dense()) for name in layers)


def four_bits(bnb, layer):
    """A frozen linear in nf4, and the weight (d_out, d_in) that it computes with."""
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32)
    made.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
    made = made.to("cpu")
    return made, bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)


def eight_bits(bnb, layer):
    """The same in int8; its inputs are rounded to int8 as well."""
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    made = made.to("cpu")
    values, sizes, _ = bnb.functional.int8_vectorwise_quant(layer.weight.data.half())
    return made, values.float() * sizes.float()[:, None] / 127


@pytest.mark.parametrize("quantise", [four_bits, eight_bits])
def test_quantised_linears_give_the_gradient_of_what_they_compute(quantise, tiny, targets, random_rows, collators):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[quantised]'")
    model, dense = tiny("causal"), tiny("causal")
    batches = [collators["causal"](random_rows(4, 0))]
    for name, layer in target_linears(model, targets["causal"]).items():
        parent, _, child = name.rpartition(".")
        made, weight = quantise(bnb, layer)
        setattr(model.get_submodule(parent), child, made)
        dense.get_submodule(name).weight.data.copy_(weight)
    quantised = {name: model.get_submodule(name) for name in target_linears(dense, targets["causal"])}
    found = estimate_gradients(model, batches, quantised, mean_token_loss, seed=0, accumulator=Incremental(12))
    wanted = estimate_gradients(dense, batches, target_linears(dense, targets["causal"]), mean_token_loss, seed=0)
    for name, G in wanted.items():
        assert captured(found[name], G.double(), 4) > 0.98
