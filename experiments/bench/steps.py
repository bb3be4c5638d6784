"""One optimizer step on the adapters of a model's shapes, without the model: ours, and what it is measured against.

The per-layer LoRA-Pro step is mrflogs/LoRA-Pro's lorapro_full_adjustment in our own words: a loop over layers,
pseudo-inverses, a Sylvester equation by two general eigendecompositions. The floor reads and writes two moments of the
weights' size once and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.optimizers.riemannian import _RiemannianPreconditioner
from torch import nn

from experiments.bench.measure import Measured, measure
from experiments.config import load_config
from lora_ga.models import target_shapes
from lora_ga.optim.lora_pro import LoraProAdamW
from lora_ga.optim.scaled_adamw import ScaledAdamW

Pairs = list[tuple[nn.Parameter, nn.Parameter, float]]
SCALING, RATE = 2.0, 1e-4
WARM, TIMES = 3, 10


def shapes(overrides: Sequence[str]) -> list[tuple[int, int]]:
    """(d_out, d_in) of a configured model's targets."""
    return list(target_shapes(load_config(list(overrides)).model).values())


def pairs(layers: Sequence[tuple[int, int]], r: int) -> Pairs:
    """Random factors in the middle of a training, with gradients."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> nn.Parameter:
        parameter = nn.Parameter(0.02 * torch.randn(rows, columns, generator=generator))
        parameter.grad = 1e-3 * torch.randn(rows, columns, generator=generator)
        return parameter

    return [(matrix(r, d_in), matrix(d_out, r), SCALING) for d_out, d_in in layers]


def _measure(make: Callable[[], Callable[[], Any]]) -> Measured:
    """Of the step that `make` gives; what an optimizer keeps counts as extra memory, whenever it makes it."""
    made: list[Callable[[], Any]] = []

    def work() -> None:
        if not made:
            made.append(make())
        made[0]()

    return measure(work, warm=WARM, times=TIMES)


def lora_pro(layers: Sequence[tuple[int, int]], r: int, mode: str) -> Measured:
    """Ours."""
    made = pairs(layers, r)
    return _measure(lambda: LoraProAdamW(made, lr=RATE, mode=mode).step)  # type: ignore[arg-type]


def adamw(layers: Sequence[tuple[int, int]], r: int) -> Measured:
    """torch's fused AdamW on the same adapters."""
    factors = [factor for A, B, _ in pairs(layers, r) for factor in (A, B)]
    return _measure(lambda: torch.optim.AdamW(factors, lr=RATE, fused=True).step)


def adamw_and_grams(layers: Sequence[tuple[int, int]], r: int) -> Measured:
    """Fused AdamW and the small matrices any LoRA-Pro needs, layer by layer of one shape at once: two Gram matrices a
    pair, their eigendecompositions, and each factor's gradient times an r x r matrix twice."""
    made = pairs(layers, r)
    factors = [factor for A, B, _ in made for factor in (A, B)]
    optimizer = torch.optim.AdamW(factors, lr=RATE, fused=True)
    groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for factor in factors:
        groups.setdefault((*factor.shape,), []).append(factor)

    @torch.no_grad()
    def step() -> None:
        for (rows, _), group in groups.items():
            stacked = torch.stack([factor.detach() for factor in group]).double()
            gradient = torch.stack([factor.grad for factor in group if factor.grad is not None]).double()
            wide = rows == r
            gram = stacked @ stacked.mT if wide else stacked.mT @ stacked
            _, vectors = torch.linalg.eigh(gram)
            for small in (vectors, gram):
                gradient = small @ gradient if wide else gradient @ small
        optimizer.step()

    return _measure(lambda: step)


def floor(layers: Sequence[tuple[int, int]]) -> Measured:
    """Both moments of every weight read and written once."""

    def make() -> Callable[[], None]:
        moments = {shape: [torch.zeros(layers.count(shape), *shape) for _ in range(2)] for shape in set(layers)}

        def step() -> None:
            for first, second in moments.values():
                first.mul_(0.9)
                second.mul_(0.999)

        return step

    return _measure(make)


def multiplications(layers: Sequence[tuple[int, int]], r: int) -> Measured:
    """As many multiplications as the pass through the moments has (4r a weight), in one product of square matrices."""
    side = round((4 * r * sum(d_out * d_in for d_out, d_in in layers)) ** (1 / 3))
    left, right = torch.randn(side, side), torch.randn(side, side)
    result = torch.empty(side, side)
    return _measure(lambda: lambda: torch.mm(left, right, out=result))


class PerLayerLoraPro:
    """LoRA-Pro full, a layer at a time."""

    def __init__(self, made: Pairs, lr: float = RATE, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.pairs, self.lr, self.betas, self.t = made, lr, betas, 0
        self.moments = [(torch.zeros(B.shape[0], A.shape[1]), torch.zeros(B.shape[0], A.shape[1])) for A, B, _ in made]

    @staticmethod
    def _adjusted(
        A: torch.Tensor, B: torch.Tensor, grad_A: torch.Tensor, grad_B: torch.Tensor, s: float, *, sylvester: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        delta = 1e-8 * torch.eye(len(A))
        AA, BB = A @ A.T, B.T @ B  # (r, r)
        inverse_AA, inverse_BB = torch.linalg.pinv(AA + delta), torch.linalg.pinv(BB + delta)
        g_A = inverse_BB @ grad_A / s**2
        g_B = (grad_B - B @ (inverse_BB @ (B.T @ grad_B))) @ inverse_AA / s**2
        if sylvester:
            a, U = torch.linalg.eig(BB)
            b, V = torch.linalg.eig(AA)
            C = (-inverse_BB @ grad_A @ A.T / s**2).to(U.dtype)
            X = (U @ ((torch.linalg.inv(U) @ C @ V) / (a[:, None] + b[None])) @ torch.linalg.inv(V)).real
            g_A, g_B = g_A + X @ A, g_B - B @ X
        return g_A, g_B

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        first, second = 1 - self.betas[0] ** self.t, (1 - self.betas[1] ** self.t) ** 0.5
        for (A, B, s), (m, v) in zip(self.pairs, self.moments, strict=True):
            assert A.grad is not None and B.grad is not None
            g_A, g_B = self._adjusted(A, B, A.grad, B.grad, s, sylvester=False)
            gradient = s * (B @ g_A) + s * (g_B @ A)  # (d_out, d_in)
            m.mul_(self.betas[0]).add_(gradient, alpha=1 - self.betas[0])
            v.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
            u = (m / first) / (v.sqrt() / second + 1e-8)
            g_A, g_B = self._adjusted(A, B, s * (B.T @ u), s * (u @ A.T), s, sylvester=True)
            A.sub_(g_A, alpha=self.lr)
            B.sub_(g_B, alpha=self.lr)


def per_layer_lora_pro(layers: Sequence[tuple[int, int]], r: int) -> Measured:
    """The reference code's way."""
    made = pairs(layers, r)
    return _measure(lambda: PerLayerLoraPro(made).step)


def scaled(layers: Sequence[tuple[int, int]], r: int) -> Measured:
    """Our preconditioned AdamW."""
    made = pairs(layers, r)
    return _measure(lambda: ScaledAdamW(made, lr=RATE).step)


def riemannian(layers: Sequence[tuple[int, int]], r: int) -> Measured:
    """PEFT's preconditioner (as create_riemannian_optimizer hooks it up) before torch's AdamW."""
    made = pairs(layers, r)
    preconditioner = _RiemannianPreconditioner([(A, B) for A, B, _ in made], 1e-6)
    optimizer = torch.optim.AdamW([factor for A, B, _ in made for factor in (A, B)], lr=RATE)

    def step() -> None:
        preconditioner.step()
        optimizer.step()

    return _measure(lambda: step)
