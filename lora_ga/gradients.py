"""The one-step gradient of frozen linears, G = sum over tokens of grad_output^T input.

Both factors pass through two hooks of every layer, so no weight needs a gradient of its own: the base may stay frozen,
and a layer's part is taken up while the backward pass is there (lora_ga/low_rank.py says what is kept of it).
Reference: Outsider565/LoRA-GA reproduce/run_exp.py (mean over micro-batches of the first rows, model in train mode).
Differs in: hooks on input and output gradient instead of weight gradients; cached under a key of all that matters.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from lora_ga.engines import any_rank, is_main, rank, world_size
from lora_ga.low_rank import Accumulator, Exact, Gradient, LowRank
from lora_ga.records import content_hash

log = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]
LEFT, RIGHT = "/left", "/right"  # of a low-rank gradient's tensors in the cache


@contextmanager
def _graph_from_embeddings(model: nn.Module) -> Iterator[None]:
    """Give the graph a root when every weight is frozen: embeddings' outputs ask for a gradient."""

    def require(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)

    hooks = [m.register_forward_hook(require) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watched_gradients(
    model: nn.Module, layers: Mapping[str, nn.Linear], take: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Within, each backward pass gives `take` the two factors of every layer's gradient, G = D^T X, frozen or not.

    take(name, D, X): D (tokens, d_out) the gradient of the layer's output, X (tokens, d_in) its input, as they come.
    """

    def watch(name: str) -> Callable[..., None]:
        def forward_hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            X = inputs[0].detach()
            output.register_hook(lambda D: take(name, D.detach().flatten(0, -2), X.flatten(0, -2)))

        return forward_hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with _graph_from_embeddings(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    states = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in states:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, state in states:
            parameter.requires_grad_(state)


def estimate_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Linear],
    loss: Loss,
    *,
    seed: int,
    dropout: bool = True,
    shares: Sequence[float] | None = None,
    accumulator: Accumulator | None = None,
) -> dict[str, Gradient]:
    """Sum over `batches` of their shares times dL/dW for each of `layers`, float32.

    Args:
        batches: micro-batches as `loss(model, batch)` takes them, the same on every rank, which share them out.
        layers: name -> nn.Linear with weight (d_out, d_in); they may be frozen, sharded or quantised.
        seed: of the dropout masks, each batch has its own; the caller's random state is left as it was.
        dropout: train mode as in the paper's code (T5 drops out, Llama has nothing to drop), else eval mode.
        shares: what each batch weighs; by default all the same, as in the papers' code, and together 1.
        accumulator: a fresh one; whole matrices on the CPU by default.
    Returns:
        name -> G (d_out, d_in), or its factors. No parameter has a `.grad` afterwards that it did not have before.
    """
    accumulator, shares = accumulator or Exact(), shares or [1 / len(batches)] * len(batches)
    accumulator.begin({name: (layer.out_features, layer.in_features) for name, layer in layers.items()})
    counts = True  # whether the batch at work is this rank's to add
    reached: set[str] = set()

    def take(name: str, D: torch.Tensor, X: torch.Tensor) -> None:
        reached.add(name)
        if counts:
            accumulator.add(name, D, X)

    training = model.training
    try:
        with torch.random.fork_rng(devices=[]), _frozen(model), watched_gradients(model, layers, take):
            model.train(dropout)
            starts = [s for _ in range(accumulator.passes) for s in range(0, len(batches), world_size())]
            for start in tqdm(starts, desc="one-step gradient", unit="batch", leave=False, disable=not is_main()):
                # A rank without a batch computes all the same: with ZeRO-3 the others need its slices of the weights.
                counts = start + rank() < len(batches)
                index = start + rank() if counts else start
                torch.manual_seed(seed + index)
                (shares[index] * loss(model, batches[index])).backward()
                if start == starts[-1]:
                    missing = [name for name in layers if name not in reached]
                    if missing:
                        raise RuntimeError(f"no gradient reached {missing[:3]}: the loss does not depend on them")
                    accumulator.end_pass()
    finally:
        model.train(training)
    return accumulator.result()


def cached_gradients(
    key: Mapping[str, Any], folder: Path | None, estimate: Callable[[], dict[str, Gradient]]
) -> tuple[dict[str, Gradient], bool]:
    """Gradients from `folder` if they were stored under `key`, else estimated and stored; says which.

    `key` holds everything the result depends on: model, rows, dtype, batch shape, dropout, seed, targets, accumulation.
    """
    if folder is None:
        return estimate(), False
    path = folder / f"{content_hash(dict(key), 24)}.safetensors"
    if not any_rank(not path.exists()):
        log.info("one-step gradient read from %s", path)
        return _joined(load_file(path)), True
    gradients = estimate()
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(_apart(gradients), temporary)
        temporary.replace(path)
    return gradients, False


def _apart(gradients: Mapping[str, Gradient]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, G in gradients.items():
        parts = {LEFT: G.left, RIGHT: G.right} if isinstance(G, LowRank) else {"": G}
        tensors |= {name + suffix: tensor.contiguous() for suffix, tensor in parts.items()}
    return tensors


def _joined(tensors: Mapping[str, torch.Tensor]) -> dict[str, Gradient]:
    whole = {name: G for name, G in tensors.items() if not name.endswith((LEFT, RIGHT))}
    names = [name.removesuffix(LEFT) for name in tensors if name.endswith(LEFT)]
    return {**whole, **{name: LowRank(tensors[name + LEFT], tensors[name + RIGHT]) for name in names}}
