"""Scaled AdamW equals its dense oracle, alone and batched."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from lora_ga.optim.scaled_adamw import ScaledAdamW, preconditioner
from tests.oracles.scaled_adamw_dense import DenseScaled

SHAPES = [(9, 2, 7, 8.0), (9, 2, 7, 8.0), (5, 2, 12, 5.657), (6, 4, 6, 4.0)]


def problem(zero_B=False):
    """Pairs and a least-squares target for each, float64."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = [
        (Parameter(randn(r, d_in)), Parameter(randn(d_out, r) * (0 if zero_B else 1)), s)
        for d_out, r, d_in, s in SHAPES
    ]
    return pairs, [randn(d_out, d_in) for d_out, _, d_in, _ in SHAPES]


def run(optimizer, pairs, targets, steps):
    for _ in range(steps):
        for (A, B, s), W in zip(pairs, targets, strict=True):
            G = s * B.detach() @ A.detach() - W
            A.grad, B.grad = s * B.detach().T @ G, s * G @ A.detach().T
        optimizer.step()


@pytest.mark.parametrize("zero_B", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_equals_dense_oracle(zero_B, weight_decay):
    pairs, targets = problem(zero_B)
    dense = [DenseScaled(A.detach().numpy(), B.detach().numpy(), 1e-2, weight_decay=weight_decay) for A, B, _ in pairs]
    optimizer = ScaledAdamW(pairs, lr=1e-2, weight_decay=weight_decay, moment_dtype=torch.float64)
    for _ in range(5):
        for layer, (_, _, s), W in zip(dense, pairs, targets, strict=True):
            G = s * layer.B @ layer.A - W.numpy()
            layer.step(s * layer.B.T @ G, s * G @ layer.A.T)
        run(optimizer, pairs, targets, 1)
    for (A, B, _), layer in zip(pairs, dense, strict=True):
        np.testing.assert_allclose(A.detach().numpy(), layer.A, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(B.detach().numpy(), layer.B, rtol=1e-8, atol=1e-9)


def test_no_bias_correction():
    """First step: 0.1 g / (sqrt(0.001) |g|), 3.16 times Adam's; a convention, so a test says it."""
    pairs, targets = problem(zero_B=True)
    run(ScaledAdamW(pairs, lr=1e-3), pairs, targets, 1)
    for _, B, _ in pairs:
        torch.testing.assert_close(B.detach().abs(), torch.full_like(B, 1e-3 * 0.1 / 0.001**0.5), rtol=1e-3, atol=0.0)


def test_preconditioner_falls_back_to_the_identity():
    singular, sound = torch.zeros(2, 3), torch.eye(2, 3)
    inverse = preconditioner(torch.stack([singular, sound]), delta=0.0)
    torch.testing.assert_close(inverse, torch.eye(2).expand(2, 2, 2))


def test_state_dict_continues_identically(tmp_path):
    pairs, targets = problem()
    optimizer = ScaledAdamW(pairs, lr=1e-2)
    run(optimizer, pairs, targets, 2)
    copies = copy.deepcopy(pairs)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = ScaledAdamW(copies, lr=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    run(optimizer, pairs, targets, 3)
    run(resumed, copies, targets, 3)
    for (A, B, _), (C, D, _) in zip(pairs, copies, strict=True):
        assert torch.equal(A, C) and torch.equal(B, D)
