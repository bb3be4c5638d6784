"""G = sum over tokens of D^T X for each layer, from its input X and output gradient D of one micro-batch after another.

`Exact` adds the products up; `Incremental` and `Sketch` never form one: of a layer they keep k columns and k rows,
memory O((d_out + d_in) k). Range finder with power iterations: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms
4.3 and 4.4. Several ranks exchange what they keep and nothing larger.
Differs in: LoRA-GA's and LoRA-One's code keeps every whole gradient and decomposes it afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lora_ga.engines import device as engine_device
from lora_ga.engines import from_ranks, sum_over_ranks

Shapes = Mapping[str, tuple[int, int]]
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LowRank:
    """The matrix left @ right: left (d_out, k) with orthonormal columns, right (k, d_in)."""

    left: torch.Tensor
    right: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def __neg__(self) -> LowRank:
        return LowRank(-self.left, self.right)

    def dense(self) -> torch.Tensor:
        return self.left @ self.right


Gradient = torch.Tensor | LowRank


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(columns)[0]


def _transposed_product(tall: torch.Tensor, thin: torch.Tensor) -> torch.Tensor:
    """tall^T thin (n, k), float32, of tall (T, n) and thin (T, k): in bfloat16 on a CPU the other order is slow."""
    return (thin.mT @ tall).mT.float()


def _find(times: Product, transposed: Product, start: torch.Tensor, power_iterations: int) -> LowRank:
    """The rank-k truncation of a matrix known by its products, begun from `start` (d_in, k)."""
    Q = _orthonormal(times(start))  # (d_out, k)
    for _ in range(power_iterations):
        Q = _orthonormal(times(_orthonormal(transposed(Q))))
    return LowRank(Q, transposed(Q).mT.contiguous())


def _add_up(parts: Sequence[LowRank], start: torch.Tensor, power_iterations: int) -> LowRank:
    """The truncation of the sum of `parts`."""
    return _find(
        lambda V: sum((p.left @ (p.right @ V) for p in parts), torch.zeros(())),
        lambda Q: sum((p.right.mT @ (p.left.mT @ Q) for p in parts), torch.zeros(())),
        start,
        power_iterations,
    )


class Accumulator(ABC):
    """What one estimate keeps of the micro-batches; `passes` times over all of them."""

    passes = 1

    def begin(self, shapes: Shapes) -> None:
        """Called once before the first pass, with each layer's (d_out, d_in)."""
        self.shapes = shapes

    @abstractmethod
    def add(self, name: str, D: torch.Tensor, X: torch.Tensor) -> None:
        """Take a layer's output gradient D (T, d_out), in the dtype the layer computes in, and input X (T, d_in)."""

    @abstractmethod
    def end_pass(self) -> None:
        """Put together what the ranks have; a rank may have seen no batch."""

    @abstractmethod
    def result(self) -> dict[str, Gradient]:
        """The sum, float32, by layer."""


@dataclass
class Exact(Accumulator):
    """Whole matrices, one product at a time, kept in `dtype` on `device`, None for the model's own."""

    device: str | None = "cpu"
    dtype: torch.dtype = torch.float32
    total: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, D: torch.Tensor, X: torch.Tensor) -> None:
        G = (D.float().mT @ X.float()).to(self.device or D.device, self.dtype)  # (d_out, d_in)
        self.total[name] = self.total[name].add_(G) if name in self.total else G

    def end_pass(self) -> None:
        device = self.device or engine_device()
        for name, shape in self.shapes.items():
            mine = self.total.get(name, torch.zeros(shape, dtype=self.dtype, device=device))
            self.total[name] = sum_over_ranks(mine.to(engine_device())).to(device)

    def result(self) -> dict[str, Gradient]:
        return {name: self.total[name].float() for name in self.shapes}


@dataclass
class _Truncated(Accumulator):
    """k columns and rows a layer, fewer where the layer is smaller."""

    k: int
    seed: int = 0

    def begin(self, shapes: Shapes) -> None:
        super().begin(shapes)
        generator = torch.Generator(engine_device()).manual_seed(self.seed)
        # One for all layers of a width: drawing anew for each would cost as much as its products.
        self.starts = {
            d_in: torch.randn(d_in, min(self.k, d_in), generator=generator, device=engine_device())
            for d_in in sorted({d_in for _, d_in in shapes.values()})
        }

    def _start(self, name: str) -> torch.Tensor:
        d_out, d_in = self.shapes[name]
        return self.starts[d_in][:, : min(self.k, d_out)]  # (d_in, k)


@dataclass
class Incremental(_Truncated):
    """One pass: each micro-batch is merged into the running factors, from what they hold already, by power iterations.

    Products with D and X are computed in D's dtype, everything that is kept in float32.
    """

    power_iterations: int = 1
    kept: dict[str, LowRank] = field(default_factory=dict)

    def add(self, name: str, D: torch.Tensor, X: torch.Tensor) -> None:
        old, X = self.kept.get(name), X.to(D.dtype)

        def times(V: torch.Tensor) -> torch.Tensor:
            new = _transposed_product(D, X @ V.to(X.dtype))  # (d_out, k)
            return new if old is None else new.addmm_(old.left, old.right @ V)

        def transposed(Q: torch.Tensor) -> torch.Tensor:
            new = _transposed_product(X, D @ Q.to(D.dtype))  # (d_in, k)
            return new if old is None else new.addmm_(old.right.mT, old.left.mT @ Q)

        self.kept[name] = _find(times, transposed, self._begun(name, old), self.power_iterations)

    def _begun(self, name: str, old: LowRank | None) -> torch.Tensor:
        """Where to begin a merge, (d_in, k): a kept row each, so that no iteration goes on finding them anew, and a
        random one of half its size, so that what no batch had before is found too."""
        start = self._start(name)
        if old is None:
            return start
        sizes = old.right.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)  # (k,)
        return start + old.right.mT * (2 * len(start) ** 0.5 / sizes)

    def end_pass(self) -> None:
        for name, shape in self.shapes.items():
            start = self._start(name)
            empty = LowRank(*(torch.zeros(size, device=start.device) for size in _sizes(shape, start.shape[1])))
            mine = self.kept.get(name, empty)
            parts = [LowRank(*pair) for pair in zip(from_ranks(mine.left), from_ranks(mine.right), strict=True)]
            # one iteration more than at a micro-batch: it begins from random directions alone, and once
            self.kept[name] = _add_up(parts, start, self.power_iterations + 1) if len(parts) > 1 else mine

    def result(self) -> dict[str, Gradient]:
        return {name: self.kept[name] for name in self.shapes}


def _sizes(shape: tuple[int, int], k: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (shape[0], k), (k, shape[1])


@dataclass
class Sketch(_Truncated):
    """Linear sketches, so that a pass adds up exactly: G V for random V, then Q^T G; each further pair of passes is a
    power iteration."""

    passes: int = 2

    def begin(self, shapes: Shapes) -> None:
        super().begin(shapes)
        self.basis = {name: self._start(name) for name in shapes}  # (d_in, k) before odd passes, else (d_out, k)
        self.sums: dict[str, torch.Tensor] = {}
        self.ended = 0

    def add(self, name: str, D: torch.Tensor, X: torch.Tensor) -> None:
        X = X.to(D.dtype)
        first, second = (X, D) if self.ended % 2 == 0 else (D, X)
        part = _transposed_product(second, first @ self.basis[name].to(first.dtype))
        self.sums[name] = self.sums[name].add_(part) if name in self.sums else part

    def end_pass(self) -> None:
        self.ended += 1
        for name, shape in self.shapes.items():
            side = shape[(self.ended + 1) % 2]
            mine = self.sums.pop(name, torch.zeros(side, self.basis[name].shape[1], device=engine_device()))
            self.sums[name] = sum_over_ranks(mine)
            if self.ended < self.passes:
                self.basis[name] = _orthonormal(self.sums.pop(name))

    def result(self) -> dict[str, Gradient]:
        return {name: LowRank(self.basis[name], self.sums[name].mT.contiguous()) for name in self.shapes}
