"""MT-Bench's scores: every answer graded by a judge, FastChat's judgment file, means by turn and category.

Source: Zheng et al., NeurIPS 2023; FastChat's llm_judge (gen_judgment.py, common.py, show_result.py).
Differs in: the score is the median over repeats; without any readable rating it is -1 as in FastChat, whose show_result
leaves such rows out of its means without a word: here they are counted and listed.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.judge import JudgeSettings, Reply, ask, median_rating, parse_rating, safe_name
from eval.judge_prompts import JudgePrompt, JudgePrompts, load_prompts
from eval.mt_bench import Answer, Question, fingerprint
from lora_ga.errors import SetupError
from lora_ga.records import write_atomic

log = logging.getLogger(__name__)

UNPARSED = -1.0  # FastChat's score of a judgment without a rating


@dataclass(frozen=True)
class Judgment:
    """One answer's grade: what the judge was asked and every reply of it."""

    question_id: int
    category: str
    turn: int
    with_reference: bool
    prompt: JudgePrompt
    user_prompt: str
    replies: tuple[Reply, ...]

    @property
    def score(self) -> float | None:
        """The median rating; None if no reply has one."""
        return median_rating(self.replies)

    @property
    def ratings(self) -> list[float | None]:
        return [parse_rating(reply.text) for reply in self.replies]

    @property
    def text(self) -> str:
        """The reply nearest the median, the first of equals."""
        score = self.score
        if score is None:
            return self.replies[0].text
        rated = [(abs(rating - score), i) for i, rating in enumerate(self.ratings) if rating is not None]
        return self.replies[min(rated)[1]].text


@dataclass(frozen=True)
class Judged:
    """All judgments of one model, and what a record must know of how they came about."""

    judgments: list[Judgment]
    details: dict[str, Any]


def judge_answers(
    questions: Sequence[Question], answers: Sequence[Answer], settings: JudgeSettings, *, cache: Path
) -> Judged:
    """Have the judge grade every turn that was answered.

    Args: answers, one per question, in any order; cache, see `eval.judge.ask`.
    Returns: judgments, first turns first, and `details`: the judge, the model ids its server reported, the sha256 of
    prompts and the questions' fingerprint, what was unparsed, and whether its scores may stand beside published ones.
    Errors: SetupError for a question without an answer, and those of `ask`.
    """
    prompts = load_prompts(settings.prompts)
    given = {answer.question_id: answer for answer in answers}
    absent = [
        question.question_id for question in questions if not (q := given.get(question.question_id)) or not q.turns
    ]
    if absent:
        raise SetupError(f"questions {absent} have no answer: answer all questions before judging")
    cases = [
        (question, given[question.question_id], turn)
        for turn in (1, 2)
        for question in questions
        if turn <= min(len(given[question.question_id].turns), len(question.turns))
    ]
    asked = [_fill(prompts, *case) for case in cases]
    conversations = [
        [{"role": "system", "content": prompt.system}, {"role": "user", "content": text}] for prompt, _, text in asked
    ]
    judgments = [
        Judgment(question.question_id, question.category, turn, with_reference, prompt, text, tuple(replies))
        for (question, _, turn), (prompt, with_reference, text), replies in zip(
            cases, asked, ask(conversations, settings, cache), strict=True
        )
    ]
    return Judged(judgments, _details(questions, judgments, settings, prompts))


def _fill(prompts: JudgePrompts, question: Question, answer: Answer, turn: int) -> tuple[JudgePrompt, bool, str]:
    """The prompt of one case, whether it shows a reference, and its text."""
    with_reference = len(question.reference) >= turn
    places = {f"ref_answer_{i}": text for i, text in enumerate(question.reference, start=1)}
    if turn == 1:
        places |= {"question": question.turns[0], "answer": answer.turns[0]}
    else:
        for i in (1, 2):
            places |= {f"question_{i}": question.turns[i - 1], f"answer_{i}": answer.turns[i - 1]}
    prompt = prompts.cases[turn, with_reference]
    return prompt, with_reference, prompt.template.format(**places)


def _details(
    questions: Sequence[Question], judgments: Sequence[Judgment], settings: JudgeSettings, prompts: JudgePrompts
) -> dict[str, Any]:
    reported = Counter(safe_name(reply.model) for judgment in judgments for reply in judgment.replies)
    if len(reported) > 1:
        log.warning("the judge's server reported %d model ids: %s", len(reported), ", ".join(sorted(reported)))
    unparsed = [[judgment.question_id, judgment.turn] for judgment in judgments if judgment.score is None]
    if unparsed:
        log.warning("%d of %d judgments have no rating that can be read", len(unparsed), len(judgments))
    details = {
        "judge": settings.judge_id,
        "reported_models": dict(sorted(reported.items())),
        "trusted": settings.trusted,
        "prompts": prompts.origin,
        "prompts_sha256": prompts.sha256,
        "questions_fingerprint": fingerprint(questions),
        "repeats": settings.repeats,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "with_reference": sum(judgment.with_reference for judgment in judgments),
        "unparsed": unparsed,
        "cut_short": sum(reply.finish == "length" for judgment in judgments for reply in judgment.replies),
    }
    if not settings.trusted:
        details["note"] = (
            f"judged by {settings.judge_id}, not a trusted judge: not to be compared with published scores"
        )
    return details


def scores(judgments: Sequence[Judgment]) -> dict[str, dict[str, float]]:
    """Mean ratings as {"value", "n"}: `first_turn`, `second_turn`, `average` over both (FastChat's), `category_<name>`.

    A mean of no ratings is left out. `unparsed_judgments` and `unparsed_replies` count what is in no mean, n being all.
    """
    groups: dict[str, list[float]] = {}
    for judgment in judgments:
        if (score := judgment.score) is not None:
            turn = "first_turn" if judgment.turn == 1 else "second_turn"
            for name in (turn, "average", f"category_{judgment.category}"):
                groups.setdefault(name, []).append(score)
    means = {name: {"value": statistics.fmean(values), "n": len(values)} for name, values in sorted(groups.items())}
    ratings = [rating for judgment in judgments for rating in judgment.ratings]
    unparsed = sum(judgment.score is None for judgment in judgments)
    return means | {
        "unparsed_judgments": {"value": float(unparsed), "n": len(judgments)},
        "unparsed_replies": {"value": float(ratings.count(None)), "n": len(ratings)},
    }


def write_judgments(judgments: Sequence[Judgment], folder: Path, model_id: str, judge_id: str) -> Path:
    """Write `<folder>/model_judgment/<judge>_single.jsonl` in FastChat's format, with `ratings` of all repeats.

    `python -m fastchat.llm_judge.show_result --input-file FILE` prints it; where `folder` ends in data/mt_bench,
    `--judge-model <judge>` finds it from two folders above. Files of several models may be joined end to end.
    """
    rows = [
        {
            "question_id": judgment.question_id,
            "model": safe_name(model_id),
            "judge": [judge_id, judgment.prompt.name],
            "user_prompt": judgment.user_prompt,
            "judgment": judgment.text,
            "score": UNPARSED if judgment.score is None else judgment.score,
            "ratings": judgment.ratings,
            "turn": judgment.turn,
            "tstamp": 0.0,
        }
        for judgment in judgments
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return write_atomic(folder / "model_judgment" / f"{judge_id}_single.jsonl", lines)
