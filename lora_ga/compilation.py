"""torch.compile for training, a block of the model at a time.

All blocks of a kind share one graph, so that the compiler's time does not grow with depth, and lengths are symbols of
it, so that no batch asks for another. What it fuses is not rounded to autocast's type in between: under autocast its
results lie closer to float32's than the plain path's do.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch._dynamo
import torch.fx.experimental._config
from torch import nn

from lora_ga.errors import SetupError

BACKEND = "inductor"
# Of one block's code: with and without gradients, masks and dropout, in T5's two stacks and their first blocks.
MOST_GRAPHS = 64


def check_compiler(device: str) -> None:
    """SetupError where the compiler would fail after the model is loaded: on a CPU it writes C++."""
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise SetupError(
            f"train.compile=true needs a C++ compiler, and there is no {compiler}: install g++, or set it to false"
        )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that a model repeats: what its outermost module lists hold."""
    found: list[nn.Module] = []
    for child in model.children():
        found += child if isinstance(child, nn.ModuleList) else blocks(child)
    return found


@contextmanager
def compiled_blocks(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Within, the blocks of `model` run compiled, if that is wanted; names, weights and hooks on the model stay."""
    if not wanted:
        yield
        return
    changed = blocks(model)
    with (
        torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS),
        # Else sizes that agree in the first batch, as 16 rows of 16 tokens, are one symbol, and the next compiles anew.
        torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
    ):
        for block in changed:
            block.compile(dynamic=True, backend=BACKEND)
        try:
            yield
        finally:
            for block in changed:
                block._compiled_call_impl = None
            torch._dynamo.reset()
