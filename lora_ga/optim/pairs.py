"""Optimizers over LoRA pairs (lora_A, lora_B): batching, state and checkpoints shared by LoRA-Pro and scaled AdamW.

Pairs of one shape, scaling, device and dtype are stacked, so that a step is a few batched products whatever the number
of layers. Moments live in `optimizer.state` under a batch's first lora_A and lora_B, stacked over its pairs. Several
ranks share the pairs out: each updates its own, with moments of those alone, and hands the new factors round.
Differs in: the reference codes loop over layers, and LoRA-Pro's keeps its moments outside the optimizer, unsaved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lora_ga.engines import rank, world_size
from lora_ga.errors import SetupError

MOMENTS = ("exp_avg", "exp_avg_sq")


def solve_dtype(device: torch.device) -> torch.dtype:
    """float64, in which squaring a condition number costs little; float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class PairBatch:
    """n pairs that share shape, scaling, device and dtype."""

    scaling: float
    lora_A: list[nn.Parameter] = field(default_factory=list)
    lora_B: list[nn.Parameter] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d_out, r, d_in)."""
        return self.lora_B[0].shape[0], *self.lora_A[0].shape

    def owned(self, owner: int) -> slice:
        """The pairs that rank `owner` updates."""
        n, ranks = len(self.lora_A), world_size()
        return slice(n * owner // ranks, n * (owner + 1) // ranks)

    def rows_with_gradient(self) -> Iterator[slice]:
        """Runs of neighbouring own pairs with gradients; as slices, so that state can be updated through views."""
        own = self.owned(rank())
        start = own.start
        for row in range(own.start, own.stop):
            A, B = self.lora_A[row], self.lora_B[row]
            if (A.grad is None) != (B.grad is None):
                raise RuntimeError("a LoRA pair has the gradient of one factor only: train both or neither")
            if A.grad is None:
                if start < row:
                    yield slice(start, row)
                start = row + 1
        if start < own.stop:
            yield slice(start, own.stop)

    def factors(self, rows: slice) -> list[nn.Parameter]:
        return [*self.lora_A[rows], *self.lora_B[rows]]

    def stacked(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """lora_A, its gradient (n, r, d_in), lora_B and its gradient (n, d_out, r), at least float32."""
        dtype = torch.promote_types(self.lora_A[0].dtype, torch.float32)

        def stack(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
            return torch.stack([t.detach() for t in tensors if t is not None]).to(dtype)

        A, B = self.lora_A[rows], self.lora_B[rows]
        return stack(A), stack([p.grad for p in A]), stack(B), stack([p.grad for p in B])


def write(parameters: Sequence[nn.Parameter], values: torch.Tensor) -> None:
    """Copy values (n, ...) into n parameters, rounding once to their dtype."""
    torch._foreach_copy_(list(parameters), list(values.to(parameters[0].dtype).unbind()))


def adam_direction_(
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    betas: tuple[float, float],
    eps: float | torch.Tensor,
) -> torch.Tensor:
    """Update both moments in place and overwrite `gradient` (same shape) with exp_avg / (sqrt(exp_avg_sq) + eps)."""
    m, v = exp_avg.to(gradient.dtype), exp_avg_sq.to(gradient.dtype)
    m.lerp_(gradient, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    if exp_avg.dtype != gradient.dtype:
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
    torch.sqrt(v, out=gradient)
    return torch.div(m, gradient.add_(eps), out=gradient)


class PairOptimizer(torch.optim.Optimizer):
    """Base: one parameter group over all pairs, A and B in turn; subclasses define `_update` on a run of a batch."""

    def __init__(
        self,
        pairs: Sequence[tuple[nn.Parameter, nn.Parameter, float]],
        defaults: dict[str, Any],
        moment_dtype: torch.dtype,
    ) -> None:
        batches: dict[tuple[Any, ...], PairBatch] = {}
        for A, B, scaling in pairs:
            if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
                raise ValueError(f"not a LoRA pair: lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)}")
            if scaling == 0:
                raise ValueError("a LoRA pair has scaling 0: it can not move the weight")
            key = (A.shape, B.shape, scaling, A.device, A.dtype, B.dtype)
            batch = batches.setdefault(key, PairBatch(scaling))
            batch.lora_A.append(A)
            batch.lora_B.append(B)
        self.batches = list(batches.values())
        self.moment_dtype = moment_dtype
        super().__init__([p for A, B, _ in pairs for p in (A, B)], defaults)

    def _update(self, batch: PairBatch, rows: slice, group: dict[str, Any]) -> None:
        raise TypeError(f"{type(self).__name__} does not say how its pairs move")

    def _state_shapes(self, batch: PairBatch) -> dict[nn.Parameter, torch.Size]:
        """Shape of one pair's moments kept under a parameter; factor-size by default."""
        d_out, r, d_in = batch.shape
        return {batch.lora_A[0]: torch.Size((r, d_in)), batch.lora_B[0]: torch.Size((d_out, r))}

    def _moments(self, batch: PairBatch, key: nn.Parameter, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Views on the moments kept under `key`, in `moment_dtype`, created as zeros."""
        state, own = self.state[key], batch.owned(rank())
        for name in MOMENTS:
            if name not in state:
                shape = (own.stop - own.start, *self._state_shapes(batch)[key])
                state[name] = torch.zeros(shape, dtype=self.moment_dtype, device=key.device)
        local = slice(rows.start - own.start, rows.stop - own.start)
        return state[MOMENTS[0]][local], state[MOMENTS[1]][local]

    def _bias_corrections(
        self, batch: PairBatch, rows: slice, betas: tuple[float, float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count a step of these pairs; return 1 - beta1^t and sqrt(1 - beta2^t), both (n, 1, 1), t from 1."""
        state, own = self.state[batch.lora_B[0]], batch.owned(rank())
        if "step" not in state:
            state["step"] = torch.zeros(own.stop - own.start)  # on the CPU; a pair without gradient stands still
        t = state["step"][rows.start - own.start : rows.stop - own.start].add_(1).double()
        corrections = torch.stack([1 - betas[0] ** t, (1 - betas[1] ** t).sqrt()])[..., None, None]
        first, second = corrections.to(
            batch.lora_B[0].device, torch.promote_types(batch.lora_B[0].dtype, torch.float32)
        )
        return first, second

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every pair that has gradients; a pair with the gradient of one factor only raises RuntimeError."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for batch in self.batches:
            for rows in batch.rows_with_gradient():
                self._update(batch, rows, self.param_groups[0])
        self._hand_round()
        return loss

    def _hand_round(self) -> None:
        """Give every rank the factors that the others have updated, in one message an owner."""
        for owner in range(world_size() if world_size() > 1 else 0):
            factors: list[torch.Tensor] = [f for batch in self.batches for f in batch.factors(batch.owned(owner))]
            if not factors:
                continue
            message = torch.cat([factor.flatten() for factor in factors])
            dist.broadcast(message, owner)
            parts = message.split([factor.numel() for factor in factors])
            torch._foreach_copy_(factors, [part.view_as(f) for part, f in zip(parts, factors, strict=True)])

    def check_whole(self) -> None:
        """RuntimeError if an engine has put flat slices in the pairs' place, which `step` would never see move."""
        pairs = {id(factor) for batch in self.batches for factor in batch.factors(slice(None))}
        if any(id(parameter) not in pairs for group in self.param_groups for parameter in group["params"]):
            raise RuntimeError(f"{type(self).__name__} needs whole matrices, and the engine has flattened them")

    def stand_in(self, replacements: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Move `replacements` (own parameter -> copy of its shape) from now on; before the first step."""
        for batch in self.batches:
            batch.lora_A[:] = [replacements[A] for A in batch.lora_A]
            batch.lora_B[:] = [replacements[B] for B in batch.lora_B]
        self.param_groups[0]["params"] = [replacements[p] for p in self.param_groups[0]["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict`; moments of another shape (other mode, rank or model) raise SetupError."""
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype, which would round float32 moments of bf16 factors.
        parameters = self.param_groups[0]["params"]
        saved = dict(zip(parameters, state_dict["param_groups"][0]["params"], strict=True))
        for batch in self.batches:
            own = batch.owned(rank())
            for key, pair in self._state_shapes(batch).items():
                shape = (own.stop - own.start, *pair)
                state = state_dict["state"].get(saved[key], {})
                for name in MOMENTS:
                    if name in state and state[name].shape != shape:
                        raise SetupError(
                            f"optimizer state of shape {tuple(state[name].shape)} is not {shape}: "
                            "resume with the method, steps and rank the checkpoint was written with"
                        )
                    if name in state:
                        self.state[key][name] = state[name].to(key.device, self.moment_dtype, copy=True)
