"""LoRA-One's factors: one spectral gradient step, balanced."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ga.methods.lora_one import lora_one_factors
from lora_ga.methods.svd import EXACT


@given(st.integers(1, 4), st.integers(4, 14), st.integers(4, 14), st.integers(0, 2**31), st.sampled_from([16.0, 128.0]))
@settings(deadline=None, max_examples=50)
def test_product_is_a_gradient_step_and_factors_are_balanced(r, d_out, d_in, seed, gamma):
    G = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    A, B = lora_one_factors(G, r, stable_gamma=gamma, svd=EXACT)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    assert A.shape == (r, d_in) and B.shape == (d_out, r)
    torch.testing.assert_close(B @ A, -(U[:, :r] * S[:r] @ Vh[:r]) / (gamma * S[0]))
    balanced = torch.diag(S[:r]) / (gamma * S[0])
    torch.testing.assert_close(A @ A.T, balanced)
    torch.testing.assert_close(B.T @ B, balanced)


def test_scale_of_the_gradient_does_not_matter():
    G = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small, large = lora_one_factors(G, 2, svd=EXACT), lora_one_factors(1000 * G, 2, svd=EXACT)
    torch.testing.assert_close(small[1] @ small[0], large[1] @ large[0])


def test_the_shift_lowers_a_linearised_loss():
    G = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    A, B = lora_one_factors(G, 3)
    assert (G * (B @ A)).sum() < 0
