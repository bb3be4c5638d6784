"""The loss of a batch from the scored positions alone.

The output layer maps every position to 49 thousand words and more; only the target's positions count. A hook hands it
just those rows (a contiguous gather), so it works under PEFT, DDP and DeepSpeed wrappers alike and T5's too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from lora_ga.data.encoding import IGNORED, Collator, EncodedRow


@contextmanager
def only_positions(model: nn.Module, mask: torch.Tensor) -> Iterator[None]:
    """Within, logits are (number of True in mask, vocabulary), in row-major order of mask (batch, length)."""
    head = model.get_output_embeddings()  # type: ignore[operator]

    def select(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][mask], *inputs[1:])

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def scored_logits(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    autocast: torch.dtype | None = None,
    head: nn.Module | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, vocabulary) float32 and labels (N,) at the N scored positions of a collated batch.

    `head` is the model that owns the output layer, where `model` is an engine's wrapper around it.
    """
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    mask = labels != IGNORED
    kind = labels.device.type
    with only_positions(head or model, mask), torch.autocast(kind, autocast, enabled=autocast is not None):
        logits = model(**inputs).logits
    return logits.float(), labels[mask]


def mean_token_loss(
    model: nn.Module, batch: Mapping[str, torch.Tensor], autocast: torch.dtype | None = None
) -> torch.Tensor:
    """Mean cross-entropy over the batch's scored tokens."""
    logits, labels = scored_logits(model, batch, autocast)
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    collator: Collator,
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> float:
    """Mean cross-entropy over all target tokens of `rows`, in eval mode; the model's mode is restored."""
    ordered = sorted(rows, key=lambda row: len(row.prompt) + len(row.target))
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for start in range(0, len(ordered), batch_size):
            batch = {key: value.to(device) for key, value in collator(ordered[start : start + batch_size]).items()}
            logits, labels = scored_logits(model, batch, autocast)
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            tokens += len(labels)
    finally:
        model.train(training)
    return total / tokens
