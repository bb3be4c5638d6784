"""An optimizer of whole matrices inside a DeepSpeed engine that holds flat slices of them (ZeRO-2 and 3).

The engine runs SGD with rate 1. At each step boundary the pairs' full gradients and values are read out of it, the real
optimizer moves copies of the pairs, and what the engine then subtracts as "the gradient" is old minus new value.
DeepSpeed's own answer to such optimizers is a warning (zero_allow_untested_optimizer): see its issues 7807 and 8438.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_ga.optim.pairs import PairOptimizer


class PairsUnderZero:
    """`optimizer` moves the pairs of an engine, through copies; clipping, too, is left to it."""

    def __init__(self, optimizer: PairOptimizer) -> None:
        self.optimizer = optimizer
        self.parameters: Sequence[nn.Parameter] = list(optimizer.param_groups[0]["params"])
        self.copies = [nn.Parameter(parameter.detach().float().clone()) for parameter in self.parameters]
        optimizer.stand_in(dict(zip(self.parameters, self.copies, strict=True)))

    def engine_optimizer(self) -> torch.optim.Optimizer:
        """What the engine runs: it subtracts what it takes for the gradient."""
        return torch.optim.SGD(self.parameters, lr=1.0)

    def drive(self, engine: Any) -> None:
        """From now on each of the engine's steps is this optimizer's."""
        step = engine.step

        def with_pairs(*args: Any, **kwargs: Any) -> Any:
            if engine.is_gradient_accumulation_boundary():
                self._move()
            return step(*args, **kwargs)

        engine.step = with_pairs

    @torch.no_grad()
    def _move(self) -> None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_grad

        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            copy.copy_(safe_get_full_fp32_param(parameter))
            gradient = safe_get_full_grad(parameter)
            assert gradient is not None, "the engine has no gradient of a LoRA factor"
            copy.grad = gradient.to(copy.dtype).view_as(copy).clone()
        before = [copy.detach().clone() for copy in self.copies]
        self.optimizer.step()
        for parameter, copy, old in zip(self.parameters, self.copies, before, strict=True):
            safe_set_full_grad(parameter, old - copy)
            copy.grad = None
