"""How far a step follows the full gradient: LoRA-GA's and LoRA-Pro's theory, measured while training.

For every target W (d_out, d_in), with G = dL/dW of the step's whole batch at the weights before it: `alignment` is the
cosine between -G and the change of W + s B A, all layers as one vector; `captured` the share of |G|^2 in the adapters'
tangent space {B X + Y A}. For a small step alignment^2 <= captured: LoRA-Pro (arXiv 2407.18242, theorem 2.1) goes for
the projection, where they are equal, LoRA-GA (arXiv 2407.05000, section 3) for a start where captured is largest.
Costs a float32 copy of all targets on the CPU while a step is measured, two under full fine-tuning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lora_ga.adapters import adapter_pairs, target_linears
from lora_ga.engines import whole
from lora_ga.gradients import watched_gradients
from lora_ga.low_rank import Exact


def _columns(matrix: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (n, rank) of the column space of a matrix (n, r)."""
    U, S, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    # of the factors' own precision: what float32 arithmetic leaves of a lost direction is no direction
    floor = torch.finfo(torch.float32).eps * max(matrix.shape) * S.amax()
    return U[:, floor < S].to(matrix.dtype)


def captured_energy(G: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    """|G|^2 - |(I - P_B) G (I - P_A)|^2 of G (d_out, d_in): what the tangent space of lora_B lora_A has of it.

    P_B projects on the columns of lora_B (d_out, r), P_A on the rows of lora_A (r, d_in). A scalar.
    """
    of_B, of_A = _columns(lora_B), _columns(lora_A.mT)
    inside = of_B.mT @ G  # (rank B, d_out) (d_out, d_in)
    left = (G @ of_A) - of_B @ (inside @ of_A)  # (I - P_B) G P_A in the basis of A: (d_out, rank A)
    return inside.square().sum() + left.square().sum()


def product_change(
    lora_A: torch.Tensor, lora_B: torch.Tensor, new_A: torch.Tensor, new_B: torch.Tensor
) -> torch.Tensor:
    """new_B new_A - lora_B lora_A (d_out, d_in), without the loss of digits that subtracting two products has."""
    return new_B @ (new_A - lora_A) + (new_B - lora_B) @ lora_A


@dataclass(frozen=True)
class _Target:
    """A linear whose gradient is watched, and what moves it: (lora_A, lora_B), or its own weight alone."""

    layer: nn.Linear
    moving: tuple[torch.Tensor, ...]
    scaling: float = 1.0

    def values(self) -> list[torch.Tensor]:
        """Float32 copies of what moves, on the CPU."""
        with whole(self.moving):
            return [parameter.detach().to("cpu", torch.float32, copy=True) for parameter in self.moving]


class Alignment:
    """Watches the steps of a prepared model: `micro_batch` around each of a step's backward passes, then `measured`."""

    def __init__(self, model: nn.Module, target_modules: tuple[str, ...]) -> None:
        self.model = model
        self.targets = {
            pair.name: _Target(pair.base, (pair.lora_A, pair.lora_B), pair.scaling) for pair in adapter_pairs(model)
        } or {name: _Target(layer, (layer.weight,)) for name, layer in target_linears(model, target_modules).items()}
        self.layers = {name: target.layer for name, target in self.targets.items()}
        self.before: dict[str, list[torch.Tensor]] = {}
        self.gradients = Exact()
        self.seconds = 0.0

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def _add(self, name: str, D: torch.Tensor, X: torch.Tensor) -> None:
        with self._timed():
            self.gradients.add(name, D, X)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Within, forward and backward passes add to the gradient of the step, which starts with the first of them."""
        if not self.before:
            with self._timed():
                self.before = {name: target.values() for name, target in self.targets.items()}
                self.gradients = Exact()
                self.gradients.begin({name: (x.out_features, x.in_features) for name, x in self.layers.items()})
        with watched_gradients(self.model, self.layers, self._add):
            yield

    @torch.no_grad()
    def measured(self) -> tuple[dict[str, float], float]:
        """`alignment` and `captured` of the step just taken, and the seconds that measuring it took.

        Not a number where nothing moved, or there was no gradient. Every rank asks, and has the same answer.
        """
        with self._timed():
            self.gradients.end_pass()
            found, self.gradients = self.gradients.result(), Exact()
            along = moved = captured = energy = 0.0
            for name, target in self.targets.items():
                G, before, after = found.pop(name), self.before.pop(name), target.values()
                assert isinstance(G, torch.Tensor)
                adapted = len(before) == 2
                change = target.scaling * product_change(*before, *after) if adapted else after[0] - before[0]
                own = G.square().sum()
                along -= float((G * change).sum())
                moved += float(change.square().sum())
                captured += float(captured_energy(G, *before) if adapted else own)
                energy += float(own)
        seconds, self.seconds = self.seconds, 0.0
        size = math.sqrt(moved * energy)
        return {
            "alignment": along / size if size else math.nan,
            "captured": captured / energy if energy else math.nan,
        }, seconds
