"""The compiled pass through the moments against the same with torch, and what it leaves to torch."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from lora_ga.optim import compiled, lora_pro
from lora_ga.optim.lora_pro import LoraProAdamW

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def factors(shapes, r, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def matrix(rows, columns):
        return nn.Parameter(torch.randn(rows, columns, generator=generator).to(dtype))

    return [(matrix(r, d_in), matrix(d_out, r), 2.0) for d_out, d_in in shapes]


def steps(pairs, count=5, **settings):
    """Factors and moments after some steps along random gradients."""
    generator = torch.Generator().manual_seed(1)
    optimizer = LoraProAdamW(pairs, lr=1e-3, **settings)
    for _ in range(count):
        for A, B, _ in pairs:
            for factor in (A, B):
                factor.grad = torch.randn(factor.shape, generator=generator).to(factor.dtype)
        optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return [factor.detach() for A, B, _ in pairs for factor in (A, B)], moments


@pytest.fixture
def without(monkeypatch):
    """A way to run without the compiled pass."""

    def run(make):
        with monkeypatch.context() as patch:
            patch.setattr(lora_pro, "fits", lambda *_: False)
            return make()

    return run


@needs_compiler
@pytest.mark.parametrize("r", [2, 8, 16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(4, 32), (12, 96), (64, 1184)])  # 1184: two tiles and a part of one
def test_is_the_step_of_torch(shape, r, threads, without, monkeypatch):
    r = min(r, *shape)
    calls = []
    through = compiled.through_moments

    def counted(*arguments):
        calls.append(through(*arguments))
        return calls[-1]

    monkeypatch.setattr(lora_pro, "through_moments", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    mine, moments = steps(factors([shape] * 4, r))
    assert len(calls) == 5 and all(found is not None for found in calls)
    wanted, wanted_moments = without(lambda: steps(factors([shape] * 4, r)))
    assert len(calls) == 5
    for one, other in zip(moments, wanted_moments, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_threads_do_not_change_a_bit(monkeypatch):
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(steps(factors([(32, 64)] * 5, 4))[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("shape", "r", "dtype", "settings"),
    [
        ((6, 32), 2, torch.float32, {}),
        ((8, 40), 2, torch.float32, {}),
        ((8, 32), 3, torch.float32, {}),
        ((8, 32), 2, torch.float64, {}),
        ((8, 32), 2, torch.float32, {"moment_dtype": torch.bfloat16}),
    ],
)
def test_other_shapes_ranks_and_types_are_torchs(shape, r, dtype, settings, without):
    mine, _ = steps(factors([shape] * 2, r, dtype), **settings)
    wanted, _ = without(lambda: steps(factors([shape] * 2, r, dtype), **settings))
    assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


def test_without_a_compiler_the_step_is_torchs(monkeypatch, without):
    compiled._library.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    try:
        mine, _ = steps(factors([(8, 32)] * 2, 2))
    finally:
        compiled._library.cache_clear()
    wanted, _ = without(lambda: steps(factors([(8, 32)] * 2, 2)))
    assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


def test_a_compiler_that_fails_is_told_of_once(monkeypatch, tmp_path, caplog):
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    compiled._library.cache_clear()
    monkeypatch.setenv("CC", str(fake))
    try:
        mine, _ = steps(factors([(8, 32)] * 2, 2))
    finally:
        compiled._library.cache_clear()
    assert len([record for record in caplog.records if "did not compile it" in record.message]) == 1
    assert all(factor.isfinite().all() for factor in mine)
