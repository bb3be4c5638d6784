"""The typed settings of one run, group by group of conf/; what they mean is written beside the keys there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from eval.decoding import Decoding
from eval.judge import JudgeSettings
from lora_ga.data.selection import RowRule
from lora_ga.errors import SetupError
from lora_ga.low_rank import Accumulator, Exact, Incremental, Sketch
from lora_ga.models import DTYPES


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Problems that a trained model answers in words: a split of a data set, HumanEval or MT-Bench."""

    kind: Literal["math", "code", "chat"]
    source: Literal["local", "instructions", "package", "mt_bench"]
    name: str
    split: str = "test"
    rows: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """Which rows, how many, and the metrics of the table: `metric` first, then `also`."""

    name: str
    source: Literal["local", "glue", "instructions"]
    metric: str
    sizes: Mapping[str, int | None]
    max_length: PositiveInt
    data_root: str | None = None
    kind: Literal["classification", "generation"] = "classification"
    also: tuple[str, ...] = ()
    max_tokens: PositiveInt | None = None
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A template over the row's fields, with the words that stand for the labels, or a target over the fields.

    `order` is "file" for the papers' presets, whose shuffle has no effect, and "shuffled" where rows are shuffled.
    """

    template: str
    labels: tuple[str, ...] = ()
    target: str | None = None
    order: Literal["file", "shuffled"] = "shuffled"

    def rule(self, max_tokens: int | None) -> RowRule:
        """How training rows are chosen under this prompt."""
        return RowRule(order=self.order, max_tokens=max_tokens)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning-rate schedule; warmup_steps, where given, replaces the ratio."""

    lr_scheduler_type: str
    warmup_ratio: float
    warmup_steps: NonNegativeInt | None


@dataclass(frozen=True, kw_only=True)
class MathAnswers:
    """How a word problem is asked, decoded and read; `extractor` gives the number called exact_match."""

    template: str
    decoding: Decoding
    extractor: Literal["strict", "flexible", "authors"]
    markers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CodeAnswers:
    """How a programming problem is asked (over `prompt`, the stub), decoded and cut out of the answer."""

    template: str
    decoding: Decoding
    post_process: Literal["authors", "syntax"]


@dataclass(frozen=True, kw_only=True)
class ChatAnswers:
    """FastChat's conversation template, by name, and how many of the two turns are answered.

    `category_temperatures` decodes each category at FastChat's own temperature instead of the decoding's.
    """

    conversation: str
    turns: Literal[1, 2]
    category_temperatures: bool
    decoding: Decoding


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One way of asking for each kind of benchmark."""

    math: MathAnswers
    code: CodeAnswers
    chat: ChatAnswers


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What makes two papers' numbers differ though method and task are the same."""

    name: str
    model_revision: str | None
    schedule: Schedule
    answers: Answers
    prompts: Mapping[str, Prompt]


@dataclass(frozen=True, kw_only=True)
class GradientSettings:
    """The rows behind the one-step gradient, the first batch_size x batches in training, and what is kept of it.

    `mode` and the keys that belong to it are explained in lora_ga/low_rank.py.
    """

    batch_size: PositiveInt
    batches: PositiveInt
    rows_at_once: PositiveInt | None
    dropout: bool
    cache: bool
    mode: Literal["exact", "incremental", "sketch"]
    device: Literal["cpu", "model"]
    dtype: Literal["float32", "bfloat16"]
    power_iterations: NonNegativeInt
    passes: PositiveInt

    def check(self) -> None:
        """Refuse what cannot be accumulated."""
        if self.passes % 2:
            raise SetupError(f"train.gradient.passes={self.passes}: a sketch takes pairs of passes, use 2, 4, ...")

    def kept(self, k: int) -> list[Any]:
        """What decides the accumulation, for the record and the cache's key."""
        if self.mode == "exact":
            return [self.mode, self.dtype]
        return [self.mode, k, self.power_iterations if self.mode == "incremental" else self.passes]

    def accumulator(self, k: int) -> Accumulator:
        """A fresh one, which keeps k directions if it does not keep whole matrices."""
        if self.mode == "incremental":
            return Incremental(k, power_iterations=self.power_iterations)
        if self.mode == "sketch":
            return Sketch(k, passes=self.passes)
        return Exact("cpu" if self.device == "cpu" else None, DTYPES[self.dtype])


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What is scored after training, and with what means."""

    split: Literal["validation", "test"]
    limit: PositiveInt | None
    batch_size: PositiveInt
    benchmarks: tuple[str, ...] | None
    generation_batch_size: PositiveInt
    engine: Literal["hf", "vllm"]
    run_code: bool
    code_workers: PositiveInt
    judge: JudgeSettings | None


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Three sources of chance, apart."""

    data: int
    adapter: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class Logger:
    """Where a copy of the run goes."""

    name: Literal["none", "wandb"]
    mode: Literal["offline", "online"] = "offline"
    project: str = "lora-repro"
    entity: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The keys of conf/config.yaml that belong to no group."""

    experiment_name: str
    seed: int
    records: str
    outputs: str
    export: bool
    checkpoint_every: PositiveInt | None
