"""LoRA-GA's factors: orthogonality, scale, and a first step along the gradient's best rank-2r part."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ga.methods.lora_ga import lora_ga_factors
from lora_ga.methods.svd import EXACT, TruncatedSVD

SPLITS = ["ArB2r", "A2rBr", "ArBr"]
DIRECTIONS = [*SPLITS, "random"]


@st.composite
def gradients(draw):
    """G (d_out, d_in) in float64, a rank r with 2r <= both sides, a scaling."""
    r = draw(st.integers(1, 4))
    d_out, d_in = draw(st.integers(2 * r, 16)), draw(st.integers(2 * r, 16))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    U, V = (
        torch.linalg.qr(torch.randn(d, min(d_out, d_in), generator=generator, dtype=torch.float64))[0]
        for d in (d_out, d_in)
    )
    # Well separated singular values: where two are equal, "the leading 2r directions" are not defined.
    values = torch.arange(min(d_out, d_in), 0, -1, dtype=torch.float64)
    return U * values @ V.T, r, draw(st.sampled_from([2.0, 16 / r**0.5]))


def truncated(G, k):
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :k] * S[:k] @ Vh[:k]


def assert_grams(A, B, size):
    expected = size * torch.eye(len(A), dtype=A.dtype)
    torch.testing.assert_close(A @ A.T, expected)
    torch.testing.assert_close(B.T @ B, expected)


@given(gradients(), st.sampled_from(DIRECTIONS), st.sampled_from([16.0, 64.0]))
@settings(deadline=None, max_examples=40)
def test_stable_scale(case, direction, gamma):
    G, r, s = case
    A, B = lora_ga_factors(G, r, s, direction=direction, stable_gamma=gamma, svd=EXACT)
    assert A.shape == (r, G.shape[1]) and B.shape == (G.shape[0], r)
    assert_grams(A, B, G.shape[0] ** 0.5 / gamma)


@given(gradients(), st.sampled_from(DIRECTIONS))
@settings(deadline=None, max_examples=20)
def test_unit_gd_and_weight_scales(case, direction):
    G, r, s = case
    assert_grams(*lora_ga_factors(G, r, s, direction=direction, scale="unit", svd=EXACT), 1.0)
    assert_grams(*lora_ga_factors(G, r, s, direction=direction, scale="gd", svd=EXACT), 1 / s**2)
    W = G.flip(0) + 1
    mean = (torch.linalg.svdvals(W)[:r] / s).sqrt().mean()
    assert_grams(*lora_ga_factors(G, r, s, direction=direction, scale="weight_svd", W=W, svd=EXACT), float(mean) ** 2)


@given(gradients(), st.sampled_from(SPLITS))
@settings(deadline=None, max_examples=40)
def test_first_step_follows_the_rank_2r_truncation(case, direction):
    """One SGD step from the start whose product was taken off: W moves by -lr s^2 c [G]_2r, to first order in lr."""
    G, r, s = case
    A, B = lora_ga_factors(G, r, s, direction=direction, svd=EXACT)
    lr = 1e-6
    moved = s * (B - lr * s * G @ A.T) @ (A - lr * s * B.T @ G) - s * B @ A
    expected = -lr * s**2 * (G.shape[0] ** 0.5 / 16.0) * truncated(G, 2 * r)
    assert (moved - expected).norm() / expected.norm() < 1e-3


@given(gradients(), st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_random_directions_are_disjoint_and_seeded(case, seed):
    G, r, s = case
    A, B = (
        x
        for x in lora_ga_factors(
            G, r, s, direction="random", scale="unit", svd=EXACT, generator=torch.Generator().manual_seed(seed)
        )
    )
    again = lora_ga_factors(
        G, r, s, direction="random", scale="unit", svd=EXACT, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(A, again[0]) and torch.equal(B, again[1])
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    for_A = ((A @ Vh[: 2 * r].T).abs() > 0.5).any(0)
    for_B = ((B.T @ U[:, : 2 * r]).abs() > 0.5).any(0)
    assert for_A.sum() == for_B.sum() == r
    assert not (for_A & for_B).any()


def test_which_direction_goes_where():
    G = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    used = {}
    for direction in SPLITS:
        A, B = lora_ga_factors(G, 2, 1.0, direction=direction, scale="unit", svd=EXACT)
        used[direction] = (A.abs().argmax(1).tolist(), B.abs().argmax(0).tolist())
    assert used == {"ArB2r": ([0, 1], [2, 3]), "A2rBr": ([2, 3], [0, 1]), "ArBr": ([1, 3], [0, 2])}


def test_gaussian_directions_ignore_the_gradient():
    torch.manual_seed(0)
    first, second = (
        lora_ga_factors(G, 4, 2.0, direction="gaussian", generator=torch.Generator().manual_seed(1))
        for G in (torch.randn(200, 300), torch.randn(200, 300))
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    stable = 200**0.5 / 16
    torch.testing.assert_close(first[0].square().sum(1), torch.full((4,), stable), rtol=0.4, atol=0.0)
    torch.testing.assert_close(first[1].square().sum(0), torch.full((4,), stable), rtol=0.4, atol=0.0)


def test_randomised_svd_spans_what_the_exact_one_does():
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, 40))[0] for d in (60, 50))
    G = U * 0.7 ** torch.arange(40) @ V.T
    state = torch.random.get_rng_state()
    A, B = lora_ga_factors(G, 3, 2.0, svd=TruncatedSVD(2, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    exact_A, exact_B = lora_ga_factors(G, 3, 2.0, svd=EXACT)
    torch.testing.assert_close(A.T @ A, exact_A.T @ exact_A, rtol=0, atol=1e-3)
    torch.testing.assert_close(B @ B.T, exact_B @ exact_B.T, rtol=0, atol=1e-3)


def test_weight_scale_needs_the_weight():
    with pytest.raises(ValueError, match="needs the weight"):
        lora_ga_factors(torch.eye(4), 2, 1.0, scale="weight_svd")


def test_rounding_does_not_choose_the_signs():
    generator = torch.Generator().manual_seed(5)
    G = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    noise = 1e-12 * torch.randn(12, 9, generator=generator, dtype=torch.float64)
    for svd in (EXACT, TruncatedSVD(1, 8)):
        U, S, Vh = svd(G, 4)
        assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
        for one, other in zip((U, S, Vh), svd(G + noise, 4), strict=True):
            torch.testing.assert_close(one, other)
        transposed = svd(-G, 4)
        torch.testing.assert_close(transposed[2], -Vh)
