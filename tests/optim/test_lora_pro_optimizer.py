"""LoRA-Pro's optimizer equals the dense oracle, batched or not, and continues from a checkpoint."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from lora_ga.errors import SetupError
from lora_ga.optim import lora_pro
from lora_ga.optim.lora_pro import LoraProAdamW
from tests.oracles.lora_pro_dense import DensePro

CHOICES = ["sylvester", "symmetric", "zero"]
SHAPES = [(9, 2, 7, 8.0), (9, 2, 7, 8.0), (5, 2, 12, 5.657), (9, 2, 7, 2.0), (6, 4, 6, 4.0), (9, 2, 7, 8.0)]


def problem(dtype=torch.float64, seed=0):
    """Pairs of several shapes and scalings, B = 0, and a least-squares target W for each."""
    generator = torch.Generator().manual_seed(seed)
    pairs, targets = [], []
    for d_out, r, d_in, s in SHAPES:
        A = torch.randn(r, d_in, generator=generator, dtype=torch.float64) / d_in**0.5
        pairs.append((Parameter(A.to(dtype)), Parameter(torch.zeros(d_out, r, dtype=dtype)), s))
        targets.append(torch.randn(d_out, d_in, generator=generator, dtype=torch.float64).to(dtype))
    return pairs, targets


def set_gradients(pairs, targets):
    for (A, B, s), W in zip(pairs, targets, strict=True):
        G = s * B.detach() @ A.detach() - W
        A.grad, B.grad = s * B.detach().T @ G, s * G @ A.detach().T


def run(optimizer, pairs, targets, steps):
    for _ in range(steps):
        set_gradients(pairs, targets)
        optimizer.step()


def assert_same(pairs, others, **tolerance):
    for (A, B, _), (C, D, _) in zip(pairs, others, strict=True):
        torch.testing.assert_close(A, C, **tolerance)
        torch.testing.assert_close(B, D, **tolerance)


@pytest.mark.parametrize("mode", ["full", "efficient"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_optimizer_equals_dense_oracle(mode, choice, chunk, monkeypatch):
    monkeypatch.setattr(lora_pro, "CHUNK_BYTES_CPU", chunk)
    pairs, targets = problem()
    dense = [DensePro(A.detach().numpy(), B.detach().numpy(), s, 1e-2, mode, choice, 0.1) for A, B, s in pairs]
    optimizer = LoraProAdamW(
        pairs, lr=1e-2, weight_decay=0.1, mode=mode, X=choice, delta=1e-8, moment_dtype=torch.float64
    )
    assert len(optimizer.batches) == 4
    for _ in range(5):
        for layer, W in zip(dense, targets, strict=True):
            G = layer.s * layer.B @ layer.A - W.numpy()
            layer.step(layer.s * layer.B.T @ G, layer.s * G @ layer.A.T)
        run(optimizer, pairs, targets, 1)
    for (A, B, _), layer in zip(pairs, dense, strict=True):
        np.testing.assert_allclose(A.detach().numpy(), layer.A, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(B.detach().numpy(), layer.B, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_float32_stays_near_float64(mode):
    (wide, wide_targets), (narrow, narrow_targets) = problem(), problem(torch.float32)
    run(LoraProAdamW(wide, lr=1e-2, mode=mode, moment_dtype=torch.float64), wide, wide_targets, 5)
    run(LoraProAdamW(narrow, lr=1e-2, mode=mode), narrow, narrow_targets, 5)
    assert_same([(A.double(), B.double(), s) for A, B, s in narrow], wide, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_batches_equal_pairs_alone(mode):
    (pairs, targets), (alone, _) = problem(), problem()
    run(LoraProAdamW(pairs, lr=1e-2, mode=mode), pairs, targets, 3)
    for pair, target in zip(alone, targets, strict=True):
        run(LoraProAdamW([pair], lr=1e-2, mode=mode), [pair], [target], 3)
    assert_same(pairs, alone)


def test_first_full_step_is_adams():
    """At t = 1 Adam's direction is sign(g~); with square orthogonal A and B = 0 the weight moves by lr * sign(G)."""
    torch.manual_seed(0)
    A = Parameter(torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0])
    B = Parameter(torch.zeros(6, 4, dtype=torch.float64))
    G = torch.randn(6, 4, dtype=torch.float64)
    A.grad, B.grad = 2.0 * B.detach().T @ G, 2.0 * G @ A.detach().T
    before = A.detach().clone()
    LoraProAdamW([(A, B, 2.0)], lr=1e-3).step()
    assert torch.equal(A.detach(), before)
    torch.testing.assert_close((2.0 * B @ A).detach(), -1e-3 * G.sign(), rtol=1e-4, atol=1e-8)


def test_first_efficient_step_is_adams():
    pairs, targets = problem()
    run(LoraProAdamW(pairs, lr=1e-3, mode="efficient"), pairs, targets, 1)
    for _, B, _ in pairs:
        torch.testing.assert_close(B.detach().abs(), torch.full_like(B, 1e-3), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("mode", ["full", "efficient"])
@pytest.mark.parametrize("dtype, moments", [(torch.float64, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("low", [False, True])
def test_state_dict_continues_identically(mode, dtype, moments, low, tmp_path):
    moments = torch.bfloat16 if low else moments
    pairs, targets = problem(dtype)
    optimizer = LoraProAdamW(pairs, lr=1e-2, mode=mode, moment_dtype=moments)
    run(optimizer, pairs, targets, 2)
    copies = copy.deepcopy(pairs)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = LoraProAdamW(copies, lr=1.0, mode=mode, moment_dtype=moments)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert {v.dtype for s in resumed.state.values() for k, v in s.items() if k != "step"} == {moments}
    run(optimizer, pairs, targets, 3)
    run(resumed, copies, targets, 3)
    assert_same(pairs, copies, rtol=0, atol=0)


def test_state_of_the_other_mode_is_refused():
    pairs, targets = problem()
    optimizer = LoraProAdamW(pairs, lr=1e-2, mode="efficient")
    run(optimizer, pairs, targets, 1)
    with pytest.raises(SetupError, match="resume with"):
        LoraProAdamW(pairs, lr=1e-2, mode="full").load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_a_pair_without_gradients_stands_still(mode):
    (pairs, targets), (alone, _) = problem(), problem()
    optimizer = LoraProAdamW(pairs, lr=1e-2, mode=mode)
    first = pairs[1][0].detach().clone()
    for step in range(3):
        set_gradients(pairs, targets)
        if step == 0:
            pairs[1][0].grad = pairs[1][1].grad = None
        optimizer.step()
        if step == 0:
            assert torch.equal(pairs[1][0].detach(), first)
    for i, pair in enumerate(alone):
        run(LoraProAdamW([pair], lr=1e-2, mode=mode), [pair], targets[i : i + 1], 2 if i == 1 else 3)
    assert_same(pairs, alone)
    pairs[0][0].grad = None
    with pytest.raises(RuntimeError, match="one factor only"):
        optimizer.step()


@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_descends_and_follows_a_scheduler(mode):
    pairs, targets = problem()
    optimizer = LoraProAdamW(pairs, lr=5e-2, mode=mode)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 50)

    def loss():
        return sum(((s * B @ A - W) ** 2).sum().item() for (A, B, s), W in zip(pairs, targets, strict=True))

    start = loss()
    for _ in range(50):
        run(optimizer, pairs, targets, 1)
        scheduler.step()
    assert loss() < 0.7 * start
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_bad_settings_are_refused():
    pairs, _ = problem()
    for wrong in ({"mode": "half"}, {"X": "none"}):
        with pytest.raises(ValueError, match="unknown"):
            LoraProAdamW(pairs, lr=1e-2, **wrong)
    with pytest.raises(ValueError, match="not a LoRA pair"):
        LoraProAdamW([(pairs[0][1], pairs[0][0], 2.0)], lr=1e-2)
    with pytest.raises(ValueError, match="scaling 0"):
        LoraProAdamW([(pairs[0][0], pairs[0][1], 0.0)], lr=1e-2)
