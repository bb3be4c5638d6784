"""Text from prompts by transformers' models, with nothing taken from the checkpoint's generation settings.

Differs in: LoRA-GA and LoRA-Pro leave do_sample to the checkpoint's generation_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from eval.decoding import Decoding, Generation, Request, encode_prompt, split_stop
from eval.refill import continued
from eval.sampling import next_tokens
from lora_ga.errors import SetupError

# A character has at most four bytes in UTF-8, and a token of text at least one byte.
_TOKENS_OF_A_CHARACTER = 4


class _Reader:
    """Reads answers from their tokens, and says where they end.

    `prompt` is what an answer stands behind; transformers' own StopStringCriteria reads it too, so that a stop string
    that begins in the prompt ends the row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop, self.stop_ids = split_stop(tokenizer, stop)
        self.ends = [tokenizer.eos_token_id, *self.stop_ids]
        self.tail = max((len(text.encode()) for text in self.stop), default=0) + _TOKENS_OF_A_CHARACTER

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def text(self, prompt: list[int], ids: list[int]) -> str:
        """The text that the tokens `ids` add to the prompt."""
        # A tokenizer that marks word starts drops the first space of a text, so an answer is read behind its prompt.
        prompt = prompt[-_TOKENS_OF_A_CHARACTER:]
        before, whole = self._decode(prompt), self._decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self._decode(ids)

    def ended(self, prompt: list[int], ids: list[int]) -> bool:
        """Whether the last of the tokens `ids` ends the answer."""
        if ids[-1] in self.ends:
            return True
        if not self.stop:
            return False
        recent = self._decode([*prompt[-_TOKENS_OF_A_CHARACTER:], *ids[-self.tail :]][-self.tail :])
        if not any(text in recent for text in self.stop):
            return False
        return any(text in self.text(prompt, ids) for text in self.stop)  # and not in the prompt

    def generation(self, prompt: list[int], ids: list[int]) -> Generation:
        """The answer of which `ids` are all tokens."""
        ended = ids[-1] in self.ends
        text = self.text(prompt, ids[:-1] if ended else ids)
        cut = min((text.index(stop) for stop in self.stop if stop in text), default=None)
        if cut is not None:
            return Generation(text[:cut], "stop", len(ids))
        if not ended:
            return Generation(text, "length", len(ids))
        return Generation(text, "stop" if ids[-1] in self.stop_ids else "eos", len(ids))


def _check_lengths(model: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    room = None if model.config.is_encoder_decoder else getattr(model.config, "max_position_embeddings", None)
    longest = max(len(prompt) for prompt in prompts)
    if room is not None and longest + max_new_tokens > room:
        raise SetupError(
            f"a prompt of {longest} tokens and decoding.max_new_tokens={max_new_tokens} exceed the model's {room} "
            "positions: lower decoding.max_new_tokens or shorten the prompt"
        )


def _start_token(model: Any) -> int | None:
    """The first token of a decoder's answers, None for a model without an encoder."""
    if not model.config.is_encoder_decoder:
        return None
    own = model.generation_config.decoder_start_token_id
    start = own if own is not None else getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise SetupError("this sequence-to-sequence model has no decoder_start_token_id: set it in its config.json")
    return int(start)


@contextmanager
def _in_eval_mode(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def hf_batches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    seed: int,
    batch_size: int,
) -> Iterator[list[tuple[Request, Generation]]]:
    """Answer the requests with a transformers or PEFT model, longest prompts first, and yield answers as they end.

    Autocast is off within: what computes is the weights' dtype. Raises SetupError for prompts that do not fit.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # its layers are the adapted ones
    seq2seq = bool(model.config.is_encoder_decoder)
    encoded = {request.prompt: encode_prompt(tokenizer, request.prompt, seq2seq=seq2seq) for request in requests}
    _check_lengths(model, list(encoded.values()), decoding.max_new_tokens)
    # Longest first, so that a batch too large for the memory fails at once, and prompts of like length start together.
    ordered = sorted(requests, key=lambda request: len(encoded[request.prompt]), reverse=True)
    prompts = [encoded[request.prompt] for request in ordered]
    before: list[list[int]] = [[] for _ in prompts] if seq2seq else prompts
    keys = [request.random_bits(seed) for request in ordered]
    reader = _Reader(tokenizer, decoding.stop)

    def choose(logits: torch.Tensor, numbers: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
        bar.update(len(numbers))
        return next_tokens(logits, decoding, [keys[number] for number in numbers], steps)

    def ended(number: int, ids: list[int]) -> bool:
        return len(ids) == decoding.max_new_tokens or reader.ended(before[number], ids)

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    start, done = _start_token(model), 0
    with tqdm(unit="token", leave=False) as bar, _in_eval_mode(model):
        for group in continued(
            model,
            prompts,
            batch_size=batch_size,
            pad=int(pad),  # type: ignore[arg-type]
            start=start,
            choose=choose,
            ended=ended,
        ):
            done += len(group)
            bar.set_description(f"generate: {done} of {len(ordered)} answers")
            yield [(ordered[number], reader.generation(before[number], ids)) for number, ids in group]
