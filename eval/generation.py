"""Answers to prompts, kept as JSONL so that no answer is ever made twice.

One file holds what one model says under one way of decoding: its name is a hash of weights, decoding, seed, tokenizer
and engine, and each line has the hash of its prompt. Another protocol, more samples or more prompts only add lines, and
a killed run goes on from the lines it has. Two processes may share a file.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from transformers import PreTrainedTokenizerBase

from eval.decoding import Decoding, Generation, Request
from eval.engines import hf_batches
from eval.vllm_engine import vllm_batches
from lora_ga.data.encoding import tokenizer_rules
from lora_ga.errors import SetupError
from lora_ga.records import content_hash, write_atomic

log = logging.getLogger(__name__)

Engine = Literal["hf", "vllm"]
_BATCHES = {"hf": hf_batches, "vllm": vllm_batches}
_Key = tuple[str, int]  # hash of the prompt, sample number


@dataclass(frozen=True)
class GenerationReport:
    """Where the answers lie, how many were there and how many were made now, with the tokens and seconds that took."""

    path: Path
    found: int
    made: int
    tokens: int
    seconds: float


class AnswerFile:
    """The JSONL file; a line without its end, left by a killed process, counts as absent and is written over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[_Key, Generation]:
        """Every answer by hash of the prompt and sample number; of two equal ones the first."""
        answers: dict[_Key, Generation] = {}
        if not self.path.exists():
            return answers
        complete = self.path.read_bytes().rpartition(b"\n")[0]
        for number, text in enumerate(complete.splitlines(), start=1):
            try:
                line = json.loads(text)
                answer = Generation(line["text"], line["finish"], line["tokens"])
                answers.setdefault((line["prompt_hash"], line["sample"]), answer)
            except (ValueError, KeyError, TypeError):
                log.warning("%s:%d is damaged, its answer will be made again", self.path, number)
        return answers

    def append(self, answers: Sequence[tuple[Request, Generation]]) -> None:
        """Add answers; they are on disk when this returns. The first sample's line has the prompt itself."""
        lines = [
            {
                "prompt_hash": request.prompt_hash,
                "sample": request.sample,
                **dataclasses.asdict(answer),
                **({"prompt": request.prompt} if request.sample == 0 else {}),
            }
            for request, answer in answers
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.path.open("a+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # let go when the file is closed, or the process killed
            self._drop_half_a_line(handle)
            handle.write(text.encode())
            handle.flush()
            os.fsync(handle.fileno())

    @staticmethod
    def _drop_half_a_line(handle: BinaryIO) -> None:
        end = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, end - 1))
        if handle.read(1) not in (b"", b"\n"):
            handle.seek(0)
            handle.truncate(handle.read().rfind(b"\n") + 1)


def _settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, decoding: Decoding, weights: str, seed: int, engine: Engine
) -> dict[str, Any]:
    """All that decides an answer besides its prompt and sample number; a greedy one does not depend on the seed."""
    how = dataclasses.asdict(decoding)
    del how["samples"]
    return {
        "weights": weights,
        "dtype": str(next(model.parameters()).dtype) if engine == "hf" else "as exported",
        "decoding": {**how, "stop": sorted(decoding.stop)},
        "seed": seed if decoding.do_sample else None,
        "tokenizer": content_hash([tokenizer_rules(tokenizer), tokenizer.eos_token_id], 24),
        "engine": engine,
    }


def _check(model: Any, tokenizer: PreTrainedTokenizerBase, decoding: Decoding, engine: str, batch_size: int) -> None:
    decoding.check()
    if engine not in _BATCHES:
        raise SetupError(f"engine={engine} is unknown: use one of {', '.join(_BATCHES)}")
    if engine == "hf" and isinstance(model, Path):
        raise SetupError(
            f"engine=hf needs a loaded model, not the folder {model}: load it with lora_ga.models.load_model"
        )
    if batch_size < 1:
        raise SetupError(f"a batch of {batch_size} prompts is none: use at least 1")
    if tokenizer.eos_token_id is None:
        raise SetupError("the tokenizer has no eos token, so no answer would end: set its eos_token")


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    weights: str,
    seed: int,
    batch_size: int,
    folder: Path,
    engine: Engine = "hf",
) -> tuple[list[list[Generation]], GenerationReport]:
    """Continue each prompt `decoding.samples` times; what lies in `folder` is read, the rest is made and kept there.

    `model` is a transformers or PEFT model (merged generates faster); for vllm the Path of a merged model's folder, or
    what `load_vllm` gave. `weights` identifies the weights that answer: base model, adapter and step.
    result[i][k] is sample k of prompt i. Sampled answers depend on seed, prompt and sample number and not on the batch,
    up to rounding; equal prompts get equal answers. Raises SetupError for impossible settings or a missing engine.
    """
    _check(model, tokenizer, decoding, engine, batch_size)
    settings = _settings(model, tokenizer, decoding, weights, seed, engine)
    folder.mkdir(parents=True, exist_ok=True)
    file = AnswerFile(folder / f"{content_hash(settings, 24)}.jsonl")
    write_atomic(file.path.with_suffix(".settings.json"), json.dumps(settings, indent=1) + "\n")
    # A dict for its order: a prompt that occurs twice is answered once.
    wanted = list({Request(prompt, sample): None for prompt in prompts for sample in range(decoding.samples)})
    known = file.read()
    missing = [request for request in wanted if (request.prompt_hash, request.sample) not in known]
    tokens, started = 0, time.perf_counter()
    if missing:
        for batch in _BATCHES[engine](model, tokenizer, missing, decoding, seed=seed, batch_size=batch_size):
            file.append(batch)
            tokens += sum(answer.tokens for _, answer in batch)
    seconds = time.perf_counter() - started
    # Read back: where another process answered too, both return the line that came first.
    answers = file.read() if missing else known
    hashes = [Request(prompt, 0).prompt_hash for prompt in prompts]
    result = [[answers[digest, sample] for sample in range(decoding.samples)] for digest in hashes]
    return result, GenerationReport(file.path, len(wanted) - len(missing), len(missing), tokens, seconds)
