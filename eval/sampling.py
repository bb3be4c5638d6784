"""Sampling that hangs on the request alone: not on the batch it is in, nor on the rows beside it.

Gumbel noise is added to the logits and the largest taken, which is a draw from their softmax (Maddison et al.,
arXiv 1411.0030, section 2). The noise is a function of seed, prompt, sample number and step.
Differs in: LoRA-GA and LoRA-Pro draw from one global stream, so that batch size and order change every answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor, TopPLogitsWarper

from eval.decoding import Decoding

# Sorting 32 rows of SmolLM2's 49,152 logits takes 120 ms on one core, the 256 largest 8 ms; rows with more are sorted.
_USUAL_NUCLEUS = 256


class Nucleus(LogitsProcessor):
    """Top-p: keep the most likely tokens before which less than `top_p` of the probability lies."""

    def __init__(self, top_p: float, usual: int = _USUAL_NUCLEUS) -> None:
        self.top_p, self.usual, self.by_sorting = top_p, usual, TopPLogitsWarper(top_p)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        top, index = scores.softmax(dim=-1).topk(min(self.usual, scores.shape[-1]))  # (batch, usual)
        mass = top.cumsum(dim=-1)
        kept = torch.where(mass - top < self.top_p, scores.gather(1, index), -torch.inf)
        result = torch.full_like(scores, -torch.inf).scatter(1, index, kept)
        wide = mass[:, -1] < self.top_p
        if wide.any():
            result[wide] = self.by_sorting(input_ids[wide], scores[wide])
        return result


def add_gumbel_noise(scores: torch.Tensor, keys: Sequence[np.ndarray], steps: Sequence[int]) -> torch.Tensor:
    """Noise, added in place, that makes the argmax of each row (batch, vocabulary) a draw from its softmax.

    Row i's noise is that of step steps[i] in the stream of keys[i] (two uint64).
    """
    open_rows = (scores > -torch.inf).sum(dim=-1) > 1  # elsewhere noise changes nothing
    for row in open_rows.nonzero().flatten().tolist():
        stream = np.random.Generator(np.random.Philox(key=keys[row], counter=[0, steps[row], 0, 0]))
        # In double: numpy's float32 draws are 0 once in 2^23, which would let any of 50,000 tokens win.
        exponential = torch.from_numpy(stream.standard_exponential(scores.shape[-1])).float()
        scores[row] -= exponential.log().to(scores.device)
    return scores


def next_tokens(
    logits: torch.Tensor, decoding: Decoding, keys: Sequence[np.ndarray], steps: Sequence[int]
) -> torch.Tensor:
    """The next token of each row of logits (batch, vocabulary): the largest, or a draw where `decoding` samples."""
    scores = logits.to(torch.float32, copy=True)
    if decoding.do_sample:
        scores /= decoding.temperature
        if decoding.top_p < 1.0:
            scores = Nucleus(decoding.top_p)(torch.empty(len(scores), 0, device=scores.device), scores)
        add_gumbel_noise(scores, keys, steps)
    return scores.argmax(dim=-1)
