"""How to continue a prompt and what came out, with what both engines share: ids of a prompt, stop strings, randomness.

Source of the settings: LoRA-GA, LoRA-Pro and LoRA-One's eval_gsm8k.py. Differs in: LoRA-GA and LoRA-Pro leave do_sample
to the checkpoint's generation_config.json, so the same script was greedy or sampled by the checkpoint's revision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_ga.errors import SetupError

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How to continue a prompt; every setting is explicit. Temperature and top_p belong to sampling alone."""

    do_sample: bool
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    samples: int = 1
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise SetupError for settings that cannot be, or that would have no effect."""
        if self.max_new_tokens < 1 or self.samples < 1:
            raise SetupError("decoding.max_new_tokens and decoding.samples must be at least 1")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise SetupError("decoding needs temperature > 0 and 0 < top_p <= 1; for greedy set do_sample=false")
        if not self.do_sample and self.samples > 1:
            raise SetupError("greedy decoding gives one answer: set decoding.samples=1 or decoding.do_sample=true")
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise SetupError("temperature and top_p do nothing when greedy: drop them or set decoding.do_sample=true")
        if "" in self.stop:
            raise SetupError("decoding.stop holds an empty string: remove it")


@dataclass(frozen=True)
class Generation:
    """One answer: its text up to the stop string and without special tokens, and the tokens it took, eos included."""

    text: str
    finish: Finish
    tokens: int


@dataclass(frozen=True)
class Request:
    """The `sample`-th answer to a prompt."""

    prompt: str
    sample: int

    @cached_property
    def prompt_hash(self) -> str:
        return hashlib.sha256(self.prompt.encode()).hexdigest()

    def random_bits(self, seed: int) -> np.ndarray:
        """128 bits, as two uint64, that hang on the seed, the prompt and the sample number."""
        digest = hashlib.sha256(f"{seed}:{self.prompt_hash}:{self.sample}".encode()).digest()
        return np.frombuffer(digest[:16], dtype="<u8").copy()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, seq2seq: bool) -> list[int]:
    """The prompt's token ids, as in training (lora_ga/data/encoding.py); none at all raises SetupError."""
    if seq2seq:
        return [*tokenizer(prompt, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise SetupError("a prompt has no tokens, so there is nothing to continue: check the protocol's template")
    return ids


def split_stop(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> tuple[list[str], list[int]]:
    """Stop strings that are text, and the ids of those that are special tokens, which no decoded text shows.

    The tokenizer's eos ends every answer, so it is in neither.
    """
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = [special[text] for text in stop if text in special and text != tokenizer.eos_token]
    return [text for text in stop if text not in special], ids
