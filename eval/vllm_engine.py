"""Text from prompts by vLLM on a merged model's folder; imported only when asked for.

Source: vLLM's offline API (docs.vllm.ai: LLM, SamplingParams). Every request has a seed of its own, so batches do not
change what is drawn; its draws are not those of eval/sampling.py, so sampled scores of the two engines are two samples.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from eval.decoding import Decoding, Generation, Request, encode_prompt, split_stop
from lora_ga.errors import SetupError


def require_vllm() -> None:
    """SetupError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise SetupError("engine=vllm, but vllm is not installed: pip install vllm, or engine=hf")


def load_vllm(folder: Path) -> Any:
    """A vLLM engine on a merged model's folder; it keeps its memory, so load it once for all benchmarks."""
    require_vllm()
    if not (folder / "config.json").is_file():
        raise SetupError(
            f"engine=vllm reads a merged model from a folder: {folder} has no config.json, export it first"
        )
    from vllm import LLM

    return LLM(model=str(folder), generation_config="vllm")  # or it would read the folder's generation_config.json


def vllm_batches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    seed: int,
    batch_size: int,
) -> Iterator[list[tuple[Request, Generation]]]:
    """Answer the requests with vLLM and yield `batch_size` of them at a time (vLLM schedules within: use hundreds).

    `model` is a merged model's folder or what `load_vllm` gave.
    """
    llm = load_vllm(model) if isinstance(model, Path) else model
    from vllm import SamplingParams

    stop, stop_ids = split_stop(tokenizer, decoding.stop)

    def settings(request: Request) -> Any:
        return SamplingParams(
            n=1,
            temperature=decoding.temperature if decoding.do_sample else 0.0,
            top_p=decoding.top_p,
            top_k=-1,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            seed=int(request.random_bits(seed)[0] % 2**31),  # CUDA kernels take the seed as int32
            max_tokens=decoding.max_new_tokens,
            stop=stop,
            stop_token_ids=stop_ids,
            include_stop_str_in_output=False,
            skip_special_tokens=True,
            ignore_eos=False,
        )

    for first in tqdm(range(0, len(requests), batch_size), desc="generate", unit="batch", leave=False):
        batch = requests[first : first + batch_size]
        prompts = [{"prompt_token_ids": encode_prompt(tokenizer, r.prompt, seq2seq=False)} for r in batch]
        outputs = [o.outputs[0] for o in llm.generate(prompts, [settings(r) for r in batch], use_tqdm=False)]
        yield [
            (
                request,
                Generation(
                    answer.text,
                    "length" if answer.finish_reason == "length" else "eos" if answer.stop_reason is None else "stop",
                    len(answer.token_ids),
                ),
            )
            for request, answer in zip(batch, outputs, strict=True)
        ]
