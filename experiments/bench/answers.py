"""Greedy answers to word problems: the suite's generation, and transformers' generate() one problem at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from eval.decoding import Decoding, encode_prompt
from eval.generation import generate
from experiments.bench.measure import Measured, measure
from experiments.config import load_config
from experiments.rows import Rows
from lora_ga.models import Loaded, load_model

PROBLEMS, TOKENS = 24, 96


def case(overrides: Sequence[str]) -> tuple[Loaded, list[str]]:
    config = load_config(["method=lora", *overrides])
    return load_model(config.model), [prompt for prompt, _ in Rows.load(config).scored[:PROBLEMS]]


def ours(overrides: Sequence[str], batch_size: int) -> Measured:
    """As a run's benchmarks do it."""
    loaded, prompts = case(overrides)

    def work() -> list[list[Any]]:
        with tempfile.TemporaryDirectory() as folder:
            decoding = Decoding(do_sample=False, max_new_tokens=TOKENS)
            return generate(
                loaded.model,
                loaded.tokenizer,
                prompts,
                decoding,
                weights="bench",
                seed=0,
                batch_size=batch_size,
                folder=Path(folder),
            )[0]

    return measure(work, facts=lambda result: {"tokens": float(sum(answer.tokens for (answer,) in result))})


@torch.inference_mode()
def one_by_one(overrides: Sequence[str]) -> Measured:
    """A loop over the problems."""
    loaded, prompts = case(overrides)
    tokenizer = loaded.tokenizer
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=TOKENS,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    def work() -> int:
        made = 0
        for prompt in prompts:
            ids = torch.tensor([encode_prompt(tokenizer, prompt, seq2seq=False)])
            output = loaded.model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
            made += output.shape[1] - ids.shape[1]
        return made

    return measure(work, facts=lambda made: {"tokens": float(made)})
