"""LoRA-Pro's closed form has the properties the paper proves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ga.optim.lora_pro import adjust, equivalent_gradient, sylvester_X
from tests.oracles.lora_pro_dense import closed_form

CHOICES = ["sylvester", "symmetric", "zero"]


@st.composite
def layers(draw):
    """A, B, G of a random layer in float64, and a scaling (LoRA's or rsLoRA's)."""
    r = draw(st.integers(1, 4))
    d_out, d_in = draw(st.integers(r, 12)), draw(st.integers(r, 12))
    alpha = draw(st.sampled_from([1.0, 8.0, 16.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Factors with singular values in [0.5, 2]: a random square one may be singular, which is another test's subject.
    A, B = (
        torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64))[0]
        * (0.5 + 1.5 * torch.rand(r, generator=generator, dtype=torch.float64))
        @ torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0]
        for d in (d_in, d_out)
    )
    G = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    return A.T, B, G, draw(st.sampled_from([alpha / r, alpha / r**0.5]))


def lora_gradients(A, B, G, s):
    return s * B.mT @ G, s * G @ A.mT


def projectors(A, B):
    return torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)


@given(layers(), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_equivalent_gradient_is_the_projection_whatever_X(layer, seed):
    A, B, G, s = layer
    P_A, P_B = projectors(A, B)
    expected = G - (torch.eye(len(P_B)) - P_B) @ G @ (torch.eye(len(P_A)) - P_A)
    for choice in CHOICES:
        g_A, g_B = adjust(A, B, *lora_gradients(A, B, G, s), s, choice)
        X = torch.randn(len(A), len(A), generator=torch.Generator().manual_seed(seed), dtype=A.dtype)
        for step in ((g_A, g_B), (g_A + X @ A, g_B - B @ X)):
            torch.testing.assert_close(equivalent_gradient(A, B, *step, s), expected, rtol=1e-5, atol=1e-5)


@given(layers(), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=40)
def test_closer_to_the_full_gradient_than_lora_and_never_uphill(layer, rescaling):
    A, B, G, s = layer
    G_A, G_B = lora_gradients(A, B, G, s)
    ours = equivalent_gradient(A, B, *adjust(A, B, G_A, G_B, s), s)
    lora = equivalent_gradient(A, B, G_A, G_B, s)
    best = (lora * G).sum() / (lora * lora).sum()
    for factor in (rescaling, best):
        assert (ours - G).norm() <= (factor * lora - G).norm() + 1e-6
    assert (G * ours).sum() >= -1e-9
    assert (G_A * adjust(A, B, G_A, G_B, s)[0]).sum() + (G_B * adjust(A, B, G_A, G_B, s)[1]).sum() >= -1e-9


@given(layers())
@settings(deadline=None, max_examples=40)
def test_sylvester_X_solves_its_equation(layer):
    A, B, G, s = layer
    G_A, _ = lora_gradients(A, B, G, s)
    X = sylvester_X(A, B, G_A, s)
    right = -torch.linalg.inv(B.T @ B) @ G_A @ A.T / s**2
    assert (B.T @ B @ X + X @ A @ A.T - right).norm() / right.norm() < 1e-5


@given(layers())
@settings(deadline=None, max_examples=20)
def test_sylvester_X_stays_closest_to_loras_gradients(layer):
    A, B, G, s = layer
    G_A, G_B = lora_gradients(A, B, G, s)
    g_A, g_B = adjust(A, B, G_A, G_B, s, "sylvester")
    step = torch.zeros(len(A), len(A), dtype=A.dtype, requires_grad=True)
    distance = (g_A + step @ A - G_A).square().sum() + (g_B - B @ step - G_B).square().sum()
    (gradient,) = torch.autograd.grad(distance, step)
    scale = G_A.norm() * A.norm() + G_B.norm() * B.norm() + g_A.norm() * A.norm()
    assert gradient.norm() / scale < 1e-6


@given(layers())
@settings(deadline=None, max_examples=20)
def test_symmetric_X_splits_the_shared_part_equally(layer):
    A, B, G, s = layer
    P_A, P_B = projectors(A, B)
    g_A, g_B = adjust(A, B, *lora_gradients(A, B, G, s), s, "symmetric")
    shared = P_B @ G @ P_A
    for part in (s * B @ g_A, s * g_B @ A):
        torch.testing.assert_close(P_B @ part @ P_A, shared / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("delta", [1e-8, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_step_at_zero_B(choice, delta, dtype):
    torch.manual_seed(0)
    A, B, G = torch.randn(3, 7, dtype=dtype), torch.zeros(9, 3, dtype=dtype), torch.randn(9, 7, dtype=dtype)
    G_A, G_B = lora_gradients(A, B, G, 2.0)
    g_A, g_B = adjust(A, B, G_A, G_B, 2.0, choice, delta)
    assert g_A.dtype == g_B.dtype == dtype
    assert torch.equal(g_A, torch.zeros_like(A))
    torch.testing.assert_close(g_B, G_B @ torch.linalg.inv(A @ A.T) / 4, rtol=1e-4, atol=1e-6)


def test_both_factors_without_a_direction_stay_finite():
    A, B = torch.zeros(2, 5), torch.zeros(4, 2)
    A[0, 0] = B[0, 0] = 1.0
    for choice in CHOICES:
        for delta in (0.0, 1e-8):
            for g in adjust(A, B, *lora_gradients(A, B, torch.ones(4, 5), 2.0), 2.0, choice, delta):
                assert torch.isfinite(g).all()


def test_small_directions_survive_float32():
    torch.manual_seed(0)
    G = torch.randn(40, 30, dtype=torch.float64)
    A = torch.diag(torch.logspace(0, -3, 4, dtype=torch.float64)) @ torch.linalg.qr(torch.randn(30, 4).double())[0].T
    B = torch.linalg.qr(torch.randn(40, 4).double())[0] @ torch.diag(torch.logspace(-3, 0, 4, dtype=torch.float64))
    exact = equivalent_gradient(A, B, *adjust(A, B, *lora_gradients(A, B, G, 2.0), 2.0, "zero", 1e-12), 2.0)
    A, B, G = A.float(), B.float(), G.float()
    single = equivalent_gradient(A, B, *adjust(A, B, *lora_gradients(A, B, G, 2.0), 2.0, "zero", 1e-12), 2.0)
    assert (single - exact).norm() / exact.norm() < 2e-3


def test_batched_equals_one_by_one_and_unknown_X_is_refused():
    torch.manual_seed(0)
    A, B, G = (torch.randn(2, 3, *shape, dtype=torch.float64) for shape in ((2, 7), (6, 2), (6, 7)))
    G_A, G_B = lora_gradients(A, B, G, 2.0)
    batched = adjust(A, B, G_A, G_B, 2.0)
    for i in range(2):
        for j in range(3):
            single = adjust(A[i, j], B[i, j], G_A[i, j], G_B[i, j], 2.0)
            oracle = closed_form(*(x[i, j].numpy() for x in (A, B, G_A, G_B)), 2.0, "sylvester")
            for one, many, dense in zip(single, batched, oracle, strict=True):
                torch.testing.assert_close(one, many[i, j])
                torch.testing.assert_close(one, torch.from_numpy(dense), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="unknown"):
        adjust(A, B, G_A, G_B, 2.0, "none")  # type: ignore[arg-type]
