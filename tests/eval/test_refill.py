"""Proves, by counting what every forward computes, that no row waits for another and no token is computed twice."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.decoding import Decoding, Request
from eval.engines import hf_batches
from eval.refill import _FREE_SHARE, continued

# Answer lengths as a benchmark has them, most short and some long, in no order; prompts of 3 to 12 tokens.
LENGTHS = [9, 40, 12, 7, 60, 15, 5, 33, 8, 11, 21, 6, 14, 52, 10, 9, 18, 7, 27, 13, 5, 44, 8, 16]
EOS = 1


@pytest.fixture(scope="module")
def countdown() -> LlamaForCausalLM:
    """A Llama that answers token n with n - 1: nothing but the token itself reaches the output, and EOS ends at 1."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(64))
        model.lm_head.weight.copy_(torch.eye(64).roll(-1, dims=0))
    return model.eval().requires_grad_(False)


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    """Prompts whose answers by `countdown` have these lengths, EOS included."""
    return [[63] * (2 + place % 10) + [length + EOS] for place, length in enumerate(lengths)]


@contextmanager
def counted(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Within, (rows, columns) of every forward."""
    shapes: list[tuple[int, int]] = []

    def note(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        shapes.append(tuple(named["input_ids"].shape))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def slots(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes)


def refilled(model: Any, prompts: list[list[int]], batch_size: int) -> list[list[tuple[int, list[int]]]]:
    return list(
        continued(
            model,
            prompts,
            batch_size=batch_size,
            pad=0,
            start=None,
            choose=lambda logits, numbers, steps: logits.argmax(dim=-1),
            ended=lambda number, ids: ids[-1] == EOS,
        )
    )


def static(model: Any, prompts: list[list[int]], batch_size: int) -> None:
    """transformers' generate() on one batch after another: each runs until its longest answer has ended."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=64, eos_token_id=EOS, pad_token_id=0)
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        model.generate(input_ids=ids, attention_mask=(ids != 0).long(), generation_config=settings)


def test_answers_have_the_lengths_that_the_counts_rest_on(countdown: LlamaForCausalLM) -> None:
    found = dict(row for group in refilled(countdown, prompts_of(LENGTHS), 8) for row in group)
    assert [found[number] for number in range(len(LENGTHS))] == [list(range(n, 0, -1)) for n in LENGTHS]


@pytest.mark.parametrize("batch_size", [1, 4, 8, 24])
def test_every_answer_token_takes_one_slot(countdown: LlamaForCausalLM, batch_size: int) -> None:
    prompts = sorted(prompts_of(LENGTHS), key=len, reverse=True)
    with counted(countdown) as shapes:
        refilled(countdown, prompts, batch_size)
    steps = [rows for rows, columns in shapes if columns == 1]
    assert sum(steps) == sum(LENGTHS) - len(LENGTHS)  # the last token of an answer is not read
    assert sum(rows for rows, columns in shapes if columns > 1) == len(LENGTHS)  # each prompt is computed once
    assert max(rows for rows, _ in shapes) <= batch_size


@pytest.mark.parametrize("batch_size", [4, 8])
def test_refill_computes_far_less_than_static_batches(countdown: LlamaForCausalLM, batch_size: int) -> None:
    prompts = sorted(prompts_of(LENGTHS), key=len, reverse=True)
    with counted(countdown) as before:
        static(countdown, prompts, batch_size)
    with counted(countdown) as after:
        refilled(countdown, prompts, batch_size)
    assert slots(after) < 0.6 * slots(before)
    assert len(after) < len(before)  # nor are there more forwards, prompts' included


def test_places_are_filled_an_eighth_at_a_time_and_padding_is_trimmed(countdown: LlamaForCausalLM) -> None:
    prompts, batch_size = prompts_of(LENGTHS), 2 * _FREE_SHARE
    while_waiting: list[int] = []
    started: set[int] = set()
    columns: list[tuple[int, int]] = []  # of the mask, and of its longest row

    def choose(logits: torch.Tensor, numbers: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
        started.update(numbers)
        if len(started) < len(prompts):
            while_waiting.append(len(numbers))
        return logits.argmax(dim=-1)

    def note(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        columns.append((named["attention_mask"].shape[1], int(named["attention_mask"].sum(dim=1).max())))

    hook = countdown.register_forward_pre_hook(note, with_kwargs=True)
    with counted(countdown) as shapes:
        list(
            continued(
                countdown,
                prompts,
                batch_size=batch_size,
                pad=0,
                start=None,
                choose=choose,
                ended=lambda number, ids: ids[-1] == EOS,
            )
        )
    hook.remove()
    starts = [rows for rows, columns in shapes if columns > 1]
    assert starts[0] == batch_size and sum(starts) == len(LENGTHS)
    assert len(starts) > 2 and all(started >= 2 for started in starts[:-1])
    assert min(while_waiting) == batch_size - 1  # at most one place is empty while a prompt waits
    assert all(width == longest for width, longest in columns)


def test_answers_come_as_they_end(tiny: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    requests = [Request(f"w{i} w{i + 1}", sample) for i in range(6) for sample in range(3)]
    decoding = Decoding(do_sample=True, max_new_tokens=40)
    groups = list(hf_batches(tiny(), tokenizer, requests, decoding, seed=0, batch_size=4))
    assert len(groups) > 6 and {request for group in groups for request, _ in group} == set(requests)


def test_what_the_consumer_does_between_answers_is_not_in_inference_mode(
    tiny: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny().train()
    answers = hf_batches(
        model,
        tokenizer,
        [Request("w1", i) for i in range(5)],
        Decoding(do_sample=True, max_new_tokens=3),
        seed=0,
        batch_size=2,
    )
    next(answers)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    answers.close()
    assert model.training
