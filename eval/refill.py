"""Many prompts continued in one batch that stays full: a row that ends leaves at once, the next prompt takes its place.

Scheduling by step, as in Orca (Yu et al., OSDI 2022, section 3.1), over a model's own forward and transformers' cache.
Differs in: transformers' generate_batch ends rows at token ids alone, not at stop strings, and without flash attention
its mask and scores span every pair of tokens of all rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

# choose(logits (rows, vocabulary), prompt number of each row, tokens each row has) -> the rows' next tokens
Choose = Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]
# ended(prompt number, tokens of its answer, at least one) -> whether the last of them ends it
Ended = Callable[[int, list[int]], bool]

# Token slots are the same however often places are filled; forwards, each of which reads all weights, are not. To fill
# k places at a time takes N/k forwards for N prompts and leaves (k-1)/2 of B empty, so NL/(B-(k-1)/2) steps for answers
# of L tokens: together fewest at k = B sqrt(2/L), an eighth of B for 128 tokens (a fifth for 50, a sixteenth for 512).
_FREE_SHARE = 8


def _padded(prompts: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each (batch, longest prompt), padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


class _Columns:
    """Keys and values of rows padded on the left to one width, and the mask (rows, columns) of what is no padding."""

    def __init__(self, mask: torch.Tensor) -> None:
        # Without the model's config, by which a sliding window's layer would drop columns that other rows still need.
        self.cache, self.mask = DynamicCache(), mask

    def _layers(self) -> list[Any]:
        return self.cache.layers

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all other rows, and the columns that are padding for every row left."""
        mask = self.mask[rows]
        first = int(mask.any(dim=0).int().argmax())
        self.mask = mask[:, first:]
        for layer in self._layers():
            layer.keys, layer.values = layer.keys[rows, :, first:], layer.values[rows, :, first:]

    def join(self, other: _Columns) -> None:
        """Append the other's rows."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        gaps = width - self.mask.shape[1], width - other.mask.shape[1]

        def joined(mine: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
            return torch.cat([F.pad(mine, (0, 0, gaps[0], 0)), F.pad(others, (0, 0, gaps[1], 0))])

        self.mask = joined(self.mask[..., None], other.mask[..., None])[..., 0]
        for layer, new in zip(self._layers(), other._layers(), strict=True):
            layer.keys, layer.values = joined(layer.keys, new.keys), joined(layer.values, new.values)


class _Rows:
    """Sequences in a model: what each has read, and the logits (rows, vocabulary) of what comes next.

    `start` is the first token of an encoder-decoder's answers; the rows of other models read their prompts themselves.
    """

    def __init__(self, model: Any, prompts: Sequence[list[int]], pad: int, start: int | None) -> None:
        self.model, self.device = model, next(model.parameters()).device
        ids, mask = (tensor.to(self.device) for tensor in _padded(prompts, pad))
        self.own = _Columns(mask[:, :0])
        self.source: _Columns | None = None
        if start is None:
            self.logits = self._forward(ids, mask)
            return
        self.source = _Columns(mask)
        with torch.autocast(self.device.type, enabled=False):
            hidden = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        first = torch.full_like(ids[:, :1], start)
        self.logits = self._forward(first, torch.ones_like(first), hidden)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        self.own.mask = torch.cat([self.own.mask, mask], dim=1)
        inputs: dict[str, Any]
        if self.source is None:
            positions = (self.own.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            inputs = {"input_ids": ids, "attention_mask": self.own.mask, "position_ids": positions}
            inputs |= {"past_key_values": self.own.cache, "logits_to_keep": 1}
        else:
            if hidden is None:  # its keys and values are in the cache, so only its shape is read
                hidden = self.logits.new_zeros(1, 1, 1).expand(*self.source.mask.shape, 1)
            inputs = {"decoder_input_ids": ids, "decoder_attention_mask": self.own.mask}
            inputs |= {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}  # type: ignore[arg-type]
            inputs |= {"attention_mask": self.source.mask}
            inputs |= {"past_key_values": EncoderDecoderCache(self.own.cache, self.source.cache)}
        with torch.autocast(self.device.type, enabled=False):
            return self.model(**inputs, use_cache=True).logits[:, -1]

    def read(self, tokens: torch.Tensor) -> None:
        """One token (rows,) more for each row."""
        self.logits = self._forward(tokens[:, None], torch.ones_like(tokens)[:, None])

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(rows, device=self.device)
        self.logits = self.logits[index]
        for columns in (self.own, self.source):
            if columns is not None:
                columns.keep(index)

    def join(self, other: _Rows) -> None:
        """Append the other's rows."""
        self.logits = torch.cat([self.logits, other.logits])
        self.own.join(other.own)
        if self.source is not None and other.source is not None:
            self.source.join(other.source)


@torch.inference_mode()
def continued(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    pad: int,
    start: int | None,
    choose: Choose,
    ended: Ended,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Continue the prompts in their order, at most `batch_size` at a time; yields (prompt number, tokens) as they end.

    Each prompt is computed once and each token but an answer's last once: no row waits for another to end.
    """
    waiting = deque(range(len(prompts)))
    running: list[tuple[int, list[int]]] = []  # in the order of rows
    rows: _Rows | None = None
    while waiting or running:
        free = batch_size - len(running)
        if waiting and free >= min(max(1, batch_size // _FREE_SHARE), len(waiting)):
            entering = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            new = _Rows(model, [prompts[number] for number in entering], pad, start)
            if rows is None:
                rows = new
            else:
                rows.join(new)
            running += [(number, []) for number in entering]
        assert rows is not None
        tokens = choose(rows.logits, [number for number, _ in running], [len(answer) for _, answer in running])
        for (_, answer), token in zip(running, tokens.tolist(), strict=True):
            answer.append(token)
        over = [ended(number, answer) for number, answer in running]
        done = [row for row, end in zip(running, over, strict=True) if end]
        running = [row for row, end in zip(running, over, strict=True) if not end]
        if done:
            left = [place for place, end in enumerate(over) if not end]
            if left:
                rows.keep(left)
                tokens = tokens[left]
            else:
                rows = None
            yield done
        if rows is not None:
            rows.read(tokens)
