"""Benchmarks of one trained model: problems, prompts under the scoring protocol, answers, scores.

Raw answers stay in <outputs>/generations as JSONL, named by what made them, so a killed scoring continues and another
protocol that asks alike costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from eval import gsm8k, humaneval
from eval.decoding import Decoding, Generation
from eval.generation import GenerationReport, generate
from eval.vllm_engine import load_vllm
from experiments.chat import Answerer, run_mt_bench
from experiments.config import RunConfig
from experiments.settings import Benchmark
from experiments.trained import fingerprint
from lora_ga.data.tasks import Example, fill, load_task
from lora_ga.errors import SetupError
from lora_ga.merging import merged, save_merged
from lora_ga.models import Loaded
from lora_ga.records import RunRecord

Metrics = dict[str, dict[str, float]]


def run_benchmarks(config: RunConfig, record: RunRecord, loaded: Loaded, model: nn.Module) -> Metrics:
    """Score every benchmark; metrics are named <benchmark>/<metric>, and record.data says how they came about."""
    if not config.benchmarks:
        return {}
    weights = f"{loaded.identity}+{config.train_id}+{fingerprint(model)}"
    runners = {"math": _math, "code": _code, "chat": run_mt_bench}
    found: Metrics = {}
    reports = record.data.setdefault("benchmarks", {})
    work: list[GenerationReport] = []
    with _answering(config, loaded, model) as whole:
        for name, benchmark in config.benchmarks.items():
            report: dict[str, Any] = {}

            def answer(
                prompts: Sequence[str], decoding: Decoding, report: dict[str, Any] = report
            ) -> list[list[Generation]]:
                answers, made = generate(
                    whole,
                    loaded.tokenizer,
                    prompts,
                    decoding,
                    weights=weights,
                    seed=config.seeds.generation,
                    batch_size=config.eval.generation_batch_size,
                    folder=config.outputs / "generations",
                    engine=config.eval.engine,
                )
                report.setdefault("generation", []).append({**asdict(made), "path": made.path.name})
                work.append(made)
                return answers

            metrics = runners[benchmark.kind](config, benchmark, answer, report)
            found |= {f"{name}/{key}": cell for key, cell in metrics.items()}
            reports[name] = report
            if "judge" in report:
                record.data["judge"] = report["judge"]
    seconds = sum(made.seconds for made in work if made.made)
    if seconds:  # kept answers took none
        record.cost["generated_tokens_per_second"] = sum(made.tokens for made in work) / seconds
    return found


@contextmanager
def _answering(config: RunConfig, loaded: Loaded, model: nn.Module) -> Iterator[Any]:
    """What the engine generates with: the model with its adapters merged, or vLLM on a folder of it."""
    if config.eval.engine == "vllm":
        folder = config.outputs / "merged" / config.train_id
        save_merged(model, loaded.tokenizer, folder)
        yield load_vllm(folder)
        return
    with _sdpa(loaded.model), merged(model) as whole:
        yield whole


@contextmanager
def _sdpa(model: PreTrainedModel) -> Iterator[None]:
    """Within, a causal model attends by SDPA: eager attention copies a batch's keys and values at every token."""
    trained_with = model.config._attn_implementation
    if model.config.is_encoder_decoder or trained_with != "eager":
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(trained_with)


def _problems(config: RunConfig, benchmark: Benchmark) -> list[Example]:
    if benchmark.source == "package":
        return humaneval.load_problems(config.limit(benchmark))
    data = load_task(benchmark.source, benchmark.name, sizes={}, data_root=config.task.data_root)  # type: ignore[arg-type]
    if not data.splits.get(benchmark.split):
        raise SetupError(f"{benchmark.name} has no split {benchmark.split}: it has {', '.join(data.splits)}")
    return list(data.splits[benchmark.split])[: config.limit(benchmark)]


def _math(config: RunConfig, benchmark: Benchmark, answer: Answerer, report: dict[str, Any]) -> Metrics:
    """Exact match as the protocol reads it, and the three extractors side by side."""
    asked = config.scoring.answers.math
    problems = _problems(config, benchmark)
    answers = answer([fill(asked.template, problem) for problem in problems], asked.decoding)
    texts = [[sample.text for sample in samples] for samples in answers]
    metrics = gsm8k.score(texts, [problem.fields["answer"] for problem in problems], markers=asked.markers)
    report["cut_short"] = sum(sample.finish == "length" for samples in answers for sample in samples)
    return {"exact_match": metrics[asked.extractor], **metrics}


def _code(config: RunConfig, benchmark: Benchmark, answer: Answerer, report: dict[str, Any]) -> Metrics:
    """Pass@k of the programs cut out of the answers, and how many ran out of time."""
    asked = config.scoring.answers.code
    problems = _problems(config, benchmark)
    answers = answer([fill(asked.template, problem) for problem in problems], asked.decoding)
    completions = [
        [humaneval.extract(problem, sample.text, asked.post_process) for sample in samples]
        for problem, samples in zip(problems, answers, strict=True)
    ]
    result = humaneval.score(problems, completions, consent=config.eval.run_code, workers=config.eval.code_workers)
    report |= result.describe()
    return result.metrics
