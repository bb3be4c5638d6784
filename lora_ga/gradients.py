"""The one-step gradient of frozen linears, G = sum over tokens of grad_output^T input.

Both factors pass through two hooks of every layer, so no weight needs a gradient of its own: the base may stay frozen,
and only one layer's product is made at a time (LoRA-GA, arXiv 2407.05000, section 3.1 and its per-layer offloading).
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

from lora_ga.engines import any_rank, is_main, rank, sum_over_ranks, world_size
from lora_ga.engines import device as engine_device
from lora_ga.records import content_hash

log = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]


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

    take(name, D, X): D (tokens, d_out) the gradient of the layer's output, X (tokens, d_in) its input, both float32.
    """

    def watch(name: str) -> Callable[..., None]:
        def forward_hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            X = inputs[0].detach()

            def with_output_gradient(D: torch.Tensor) -> None:
                take(name, D.detach().flatten(0, -2).float(), X.flatten(0, -2).float())

            output.register_hook(with_output_gradient)

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
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Mean over `batches` of dL/dW for each of `layers`, float32 on `device`.

    Args:
        batches: micro-batches as `loss(model, batch)` takes them, the same on every rank, which share them out; each
            weighs the same, as in the paper's code.
        layers: name -> nn.Linear with weight (d_out, d_in); they may be frozen.
        seed: of the dropout masks, each batch has its own; the caller's random state is left as it was.
        dropout: train mode as in the paper's code (T5 drops out, Llama has nothing to drop), else eval mode.
    Returns:
        name -> G (d_out, d_in). No parameter has a `.grad` afterwards that it did not have before.
    """
    total: dict[str, torch.Tensor] = {}
    counts = True  # whether the batch at work is this rank's to add

    def add(name: str, D: torch.Tensor, X: torch.Tensor) -> None:
        if counts:
            G = (D.T @ X).to(device)  # (d_out, d_in)
            total[name] = total[name].add_(G) if name in total else G

    training = model.training
    try:
        with torch.random.fork_rng(devices=[]), _frozen(model), watched_gradients(model, layers, add):
            model.train(dropout)
            starts = range(0, len(batches), world_size())
            for start in tqdm(starts, desc="one-step gradient", unit="batch", leave=False, disable=not is_main()):
                # A rank without a batch computes all the same: with ZeRO-3 the others need its slices of the weights.
                counts = start + rank() < len(batches)
                index = start + rank() if counts else start
                torch.manual_seed(seed + index)
                loss(model, batches[index]).backward()
    finally:
        model.train(training)
    add_up_over_ranks(total, layers)
    missing = [name for name in layers if name not in total]
    if missing:
        raise RuntimeError(f"no gradient reached {missing[:3]}: the loss does not depend on these layers")
    return {name: total[name].div_(len(batches)) for name in layers}


def add_up_over_ranks(total: dict[str, torch.Tensor], layers: Mapping[str, nn.Linear]) -> None:
    """Put the sum over ranks in the place of each rank's part, which may be none."""
    for name, layer in layers.items() if world_size() > 1 else ():
        mine = total.get(name, torch.zeros(layer.out_features, layer.in_features))
        total[name] = sum_over_ranks(mine.to(engine_device())).to(mine.device)


def cached_gradients(
    key: Mapping[str, Any], folder: Path | None, estimate: Callable[[], dict[str, torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], bool]:
    """Gradients from `folder` if they were stored under `key`, else estimated and stored; says which.

    `key` holds everything the result depends on: model identity, rows, dtype, batch shape, dropout, seed, targets.
    """
    if folder is None:
        return estimate(), False
    path = folder / f"{content_hash(dict(key), 24)}.safetensors"
    if not any_rank(not path.exists()):
        log.info("one-step gradient read from %s", path)
        return load_file(path), True
    gradients = estimate()
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(gradients, temporary)
        temporary.replace(path)
    return gradients, False
