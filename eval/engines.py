"""Text from prompts by transformers: batched, padded on the left, with nothing taken from the checkpoint's settings.

Sampling adds Gumbel noise to the logits and takes the largest, which is a draw from their softmax (Maddison et al.,
arXiv 1411.0030, section 2). The noise is a function of seed, prompt, sample number and step.
Differs in: LoRA-GA and LoRA-Pro draw from one global stream, so that batch size and order change every answer; and
they leave do_sample to the checkpoint's generation_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from eval.decoding import Decoding, Generation, Request, encode_prompt, split_stop
from lora_ga.errors import SetupError

# A character has at most four bytes in UTF-8, and a token of text at least one byte.
_TOKENS_OF_A_CHARACTER = 4
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


class GumbelNoise(LogitsProcessor):
    """Add noise that makes the argmax a draw from the softmax; each row has its own stream, each step its place."""

    def __init__(self, requests: Sequence[Request], seed: int) -> None:
        self.keys = [request.random_bits(seed) for request in requests]
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        open_rows = (scores > -torch.inf).sum(dim=-1) > 1  # elsewhere noise changes nothing
        for row in open_rows.nonzero().flatten().tolist():
            stream = np.random.Generator(np.random.Philox(key=self.keys[row], counter=[0, self.step, 0, 0]))
            # In double: numpy's float32 draws are 0 once in 2^23, which would let any of 50,000 tokens win.
            exponential = torch.from_numpy(stream.standard_exponential(scores.shape[-1])).float()
            scores[row] -= exponential.log().to(scores.device)
        self.step += 1
        return scores


class _Answers(StoppingCriteria):
    """The answers of one batch while they grow: ends a row at a stop string, and reads the finished rows.

    transformers' own StopStringCriteria reads the prompt too, so a stop string that begins in the prompt ends the row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        stop: Sequence[str],
        start: int,
        bar: tqdm,
    ) -> None:
        self.tokenizer, self.start, self.bar = tokenizer, start, bar
        self.stop, self.stop_ids = split_stop(tokenizer, stop)
        self.ends = [tokenizer.eos_token_id, *self.stop_ids]
        # A tokenizer that marks word starts drops the first space of a text, so an answer is read behind its prompt.
        self.before = [prompt[-_TOKENS_OF_A_CHARACTER:] for prompt in prompts]
        self.tail = max((len(text.encode()) for text in self.stop), default=0) + _TOKENS_OF_A_CHARACTER
        self.length: list[int | None] = [None] * len(prompts)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def text(self, row: int, ids: list[int]) -> str:
        """The text that the tokens `ids` add to the row's prompt."""
        before, whole = self._decode(self.before[row]), self._decode([*self.before[row], *ids])
        return whole[len(before) :] if whole.startswith(before) else self._decode(ids)

    def _stopped(self, row: int, ids: list[int]) -> bool:
        recent = self._decode([*self.before[row], *ids][-self.tail :])
        if not any(text in recent for text in self.stop):
            return False
        return any(text in self.text(row, ids) for text in self.stop)  # and not in the prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        answers = input_ids[:, self.start :].tolist()
        running = [row for row, length in enumerate(self.length) if length is None]
        for row in running:
            if answers[row][-1] in self.ends or (self.stop and self._stopped(row, answers[row])):
                self.length[row] = len(answers[row])
        self.bar.update(len(running))
        return torch.tensor([length is not None for length in self.length], device=input_ids.device)

    def generation(self, row: int, ids: list[int]) -> Generation:
        """The row's answer; `ids` may go on behind its end."""
        ids = ids[: self.length[row]]
        ended = ids[-1] in self.ends
        text = self.text(row, ids[:-1] if ended else ids)
        cut = min((text.index(stop) for stop in self.stop if stop in text), default=None)
        if cut is not None:
            return Generation(text[:cut], "stop", len(ids))
        if not ended:
            return Generation(text, "length", len(ids))
        return Generation(text, "stop" if ids[-1] in self.stop_ids else "eos", len(ids))


def _padded(prompts: Sequence[list[int]], pad: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each (batch, longest prompt)."""
    width = max(len(prompt) for prompt in prompts)
    gaps = [width - len(prompt) for prompt in prompts]

    def rows(cells: Sequence[list[int]], filler: int) -> torch.Tensor:
        pairs = zip(cells, gaps, strict=True)
        return torch.tensor([[filler] * gap + cell if left else cell + [filler] * gap for cell, gap in pairs])

    return rows(prompts, pad), rows([[1] * len(prompt) for prompt in prompts], 0)


def _check_lengths(model: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    room = None if model.config.is_encoder_decoder else getattr(model.config, "max_position_embeddings", None)
    longest = max(len(prompt) for prompt in prompts)
    if room is not None and longest + max_new_tokens > room:
        raise SetupError(
            f"a prompt of {longest} tokens and decoding.max_new_tokens={max_new_tokens} exceed the model's {room} "
            "positions: lower decoding.max_new_tokens or shorten the prompt"
        )


def _start_token(model: Any) -> int | None:
    """The decoder's first token; _ready hides it from generate() with all other settings."""
    own = model.generation_config.decoder_start_token_id
    return own if own is not None else getattr(model.config, "decoder_start_token_id", None)


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    """Within, the model is in eval mode and has no generation settings of its own: generate() would fill gaps there."""
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _processors(requests: Sequence[Request], decoding: Decoding, seed: int) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if decoding.do_sample:
        if decoding.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_p < 1.0:
            processors.append(Nucleus(decoding.top_p))
        processors.append(GumbelNoise(requests, seed))
    return processors


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Request],
    prompts: Sequence[list[int]],
    decoding: Decoding,
    seed: int,
    bar: tqdm,
) -> list[tuple[Request, Generation]]:
    """One batch of requests with their prompts' ids."""
    seq2seq, device = bool(model.config.is_encoder_decoder), next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, mask = _padded(prompts, int(pad), left=not seq2seq)  # type: ignore[arg-type]
    start = 1 if seq2seq else ids.shape[1]  # where the answer begins in what generate() returns
    answers = _Answers(tokenizer, [[] for _ in prompts] if seq2seq else prompts, decoding.stop, start, bar)
    settings = GenerationConfig(
        do_sample=False,  # sampling is the argmax behind GumbelNoise
        num_beams=1,
        max_new_tokens=decoding.max_new_tokens,
        use_cache=True,
        eos_token_id=answers.ends,
        pad_token_id=pad,
        decoder_start_token_id=_start_token(model),
    )
    with _ready(model), torch.autocast(device.type, enabled=False):
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=_processors(batch, decoding, seed),
            stopping_criteria=StoppingCriteriaList([answers]),
        )
    rows = output[:, start:].tolist()
    return [(request, answers.generation(i, rows[i])) for i, request in enumerate(batch)]


def hf_batches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    seed: int,
    batch_size: int,
) -> Iterator[list[tuple[Request, Generation]]]:
    """Answer the requests with a transformers or PEFT model, longest prompts first, and yield batch by batch.

    Autocast is off within: what computes is the weights' dtype. Raises SetupError for prompts that do not fit.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # its layers are the adapted ones
    seq2seq = bool(model.config.is_encoder_decoder)
    encoded = {request.prompt: encode_prompt(tokenizer, request.prompt, seq2seq=seq2seq) for request in requests}
    _check_lengths(model, list(encoded.values()), decoding.max_new_tokens)
    # Longest first, so that a batch too large for the memory fails at once.
    ordered = sorted(requests, key=lambda request: len(encoded[request.prompt]), reverse=True)
    with tqdm(unit="token", leave=False) as bar:
        for first in range(0, len(ordered), batch_size):
            bar.set_description(f"generate: {first} of {len(ordered)} answers")
            batch = ordered[first : first + batch_size]
            prompts = [encoded[request.prompt] for request in batch]
            yield _answer(model, tokenizer, batch, prompts, decoding, seed, bar)
