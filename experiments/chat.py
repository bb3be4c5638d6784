"""MT-Bench of one trained model, where a judge is configured: answers and judgments in FastChat's format, scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from eval.decoding import Decoding, Generation
from eval.mt_bench import FASTCHAT_TEMPERATURES, answer_questions, load_questions, stop_strings, write_answers
from eval.mt_bench_scores import judge_answers, scores, write_judgments
from experiments.config import RunConfig
from experiments.settings import Benchmark

Answerer = Callable[[Sequence[str], Decoding], list[list[Generation]]]


def at_temperature(decoding: Decoding, temperature: float | None) -> Decoding:
    """The protocol's decoding, or the same at a category's temperature; 0 is greedy, as in FastChat."""
    if temperature is None:
        return decoding
    if temperature == 0:
        return replace(decoding, do_sample=False, temperature=1.0, top_p=1.0)
    return replace(decoding, do_sample=True, temperature=temperature)


def run_mt_bench(
    config: RunConfig, benchmark: Benchmark, answer: Answerer, report: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Answer the questions and have them judged; nothing at all without a judge, as answers alone score nothing.

    Files are under <outputs>/mt_bench/<run id>: `python -m fastchat.llm_judge.show_result --input-file
    <outputs>/mt_bench/<run id>/model_judgment/<judge>_single.jsonl` prints the scores.
    """
    judge, asked = config.eval.judge, config.scoring.answers.chat
    if judge is None:
        report["not_run"] = "no judge is configured (eval=judged)"
        return {}
    questions = load_questions(config.task.data_root, config.limit(benchmark))
    stops = tuple(dict.fromkeys((*asked.decoding.stop, *stop_strings(asked.conversation))))

    def complete(prompts: list[str], temperature: float | None) -> list[str]:
        decoding = replace(at_temperature(asked.decoding, temperature), stop=stops)
        return [samples[0].text for samples in answer(prompts, decoding)]

    temperatures = FASTCHAT_TEMPERATURES if asked.category_temperatures else None
    answers = answer_questions(questions, asked.conversation, complete, turns=asked.turns, temperatures=temperatures)
    folder = config.outputs / "mt_bench" / config.run_id
    model_id = f"{config.model.name}-{config.method_name}-seed{config.seed}"
    write_answers(answers, folder, model_id)
    judged = judge_answers(questions, answers, judge, cache=config.outputs / "judge" / f"{judge.judge_id}.jsonl")
    write_judgments(judged.judgments, folder, model_id, judge.judge_id)
    report["judge"] = judged.details
    return scores(judged.judgments)
