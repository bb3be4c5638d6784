"""Frozen float32 weights cast to autocast's type once, instead of at every forward pass.

Autocast keeps its casts for one pass only, and only of parameters that train; under LoRA that leaves every base weight
to be cast anew at each step. The cast is deterministic, so results are the same bit for bit. The copies take the memory
that such casts take between a forward pass and its backward pass, and keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from lora_ga.engines import is_sharded


def _product(linear: nn.Linear, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The linear's forward pass with a copy of its weight."""
    weight = linear.weight.detach().to(dtype)  # (d_out, d_in)
    plain = linear.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, linear.bias) if torch.is_autocast_enabled(x.device.type) else plain(x)

    return forward


@contextmanager
def precast(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Within, frozen float32 linears under autocast to `dtype` compute with copies of their weights as they are now.

    The weights themselves stay in place: T5 asks for their type, DoRA for their norms, checkpoints and export for
    their values. Without a dtype (no autocast) and for weights that ZeRO-3 has cut up nothing changes.
    """
    linears = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32 and not module.weight.requires_grad
    ]
    changed = [] if dtype is None or is_sharded(model) else linears
    for linear in changed:
        linear.forward = _product(linear, dtype)  # type: ignore[arg-type, assignment, method-assign]
    try:
        yield
    finally:
        for linear in changed:
            del linear.forward
