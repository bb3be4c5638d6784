"""What a judge is asked: single-answer grading of the first or the second turn, with or without a reference answer.

Source: the four cases are those of FastChat's llm_judge (gen_judgment.py, make_judge_single); the words are our own.
A file in the format of FastChat's judge_prompts.jsonl replaces them, which a number compared with published ones needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_ga.errors import SetupError
from lora_ga.records import content_hash

# (turn, with a reference answer) -> the name of that prompt in FastChat's file.
FASTCHAT_NAMES: Mapping[tuple[int, bool], str] = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
# The places each case may fill, under FastChat's names.
PLACES: Mapping[tuple[int, bool], tuple[str, ...]] = {
    (1, False): ("question", "answer"),
    (1, True): ("question", "answer", "ref_answer_1"),
    (2, False): ("question_1", "answer_1", "question_2", "answer_2"),
    (2, True): ("question_1", "answer_1", "question_2", "answer_2", "ref_answer_1", "ref_answer_2"),
}


@dataclass(frozen=True)
class JudgePrompt:
    """A system message and a template of the user's message."""

    name: str
    system: str
    template: str


@dataclass(frozen=True)
class JudgePrompts:
    """The prompts of the four cases, by (turn, with a reference)."""

    origin: str
    cases: Mapping[tuple[int, bool], JudgePrompt]

    @property
    def sha256(self) -> str:
        """Identifies the words of all four prompts."""
        return content_hash([asdict(self.cases[case]) for case in sorted(self.cases)], 64)


_SYSTEM = "You are an examiner. You read an assistant's work closely and grade it fairly."
_SCALE = (
    "Write two or three sentences on what is good and what is wrong. Then give one grade from 1 (useless) to 10 "
    "(could not be better). Put it last, on its own line, in double square brackets, in this form: Grade: [[6]]"
)
_QUALITIES = (
    "Does it do what was asked? Is what it says true? Is anything important missing? Is it clear and fitting in tone? "
    "A long answer earns nothing for its length."
)
_CORRECTNESS = (
    "Compare it with the model solution step by step and name every mistake. Another way to the same result is as "
    "good; a wrong result is a serious fault, however well it is presented."
)
_FIRST = "Grade the answer to the request below. {criteria} {scale}\n\n<request>\n{{question}}\n</request>\n\n"
_FIRST_SOLUTION = "<model solution>\n{ref_answer_1}\n</model solution>\n\n"
_FIRST_ANSWER = "<answer>\n{answer}\n</answer>"
_SECOND = (
    "Below is a conversation of two requests. Grade the second answer only; the first is there to make sense of it. "
    "{criteria} {scale}\n\n"
)
_SECOND_SOLUTIONS = (
    "<model solution of the first request>\n{ref_answer_1}\n</model solution of the first request>\n\n"
    "<model solution of the second request>\n{ref_answer_2}\n</model solution of the second request>\n\n"
)
_SECOND_ANSWERS = (
    "<first request>\n{question_1}\n</first request>\n\n<first answer>\n{answer_1}\n</first answer>\n\n"
    "<second request>\n{question_2}\n</second request>\n\n<second answer>\n{answer_2}\n</second answer>"
)


def _own(turn: int, with_reference: bool) -> JudgePrompt:
    criteria = _CORRECTNESS if with_reference else _QUALITIES
    if turn == 1:
        parts = (_FIRST.format(criteria=criteria, scale=_SCALE), _FIRST_SOLUTION * with_reference, _FIRST_ANSWER)
    else:
        parts = (_SECOND.format(criteria=criteria, scale=_SCALE), _SECOND_SOLUTIONS * with_reference, _SECOND_ANSWERS)
    return JudgePrompt(f"own-turn{turn}{'-reference' * with_reference}", _SYSTEM, "".join(parts))


OWN = JudgePrompts("own", {case: _own(*case) for case in FASTCHAT_NAMES})


def load_prompts(path: str | None) -> JudgePrompts:
    """The prompts of a file in FastChat's format, or our own where `path` is None.

    Errors: SetupError for a file that is missing or damaged, lacks one of the four prompts, or does not ask for
    [[rating]].
    """
    if path is None:
        return OWN
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        rows = {row["name"]: row for row in (json.loads(line) for line in lines if line.strip())}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SetupError(
            f"judge.prompts={path} cannot be read ({error!r}): give FastChat's judge_prompts.jsonl, or null"
        ) from error
    return JudgePrompts("file", {case: _from_row(path, name, case, rows) for case, name in FASTCHAT_NAMES.items()})


def _from_row(path: str, name: str, case: tuple[int, bool], rows: Mapping[str, Mapping[str, str]]) -> JudgePrompt:
    if name not in rows:
        raise SetupError(
            f"judge.prompts={path} has no prompt {name}: it must hold {', '.join(FASTCHAT_NAMES.values())}"
        )
    row = rows[name]
    if row.get("output_format") != "[[rating]]":
        raise SetupError(f"judge.prompts={path}: {name} must have output_format [[rating]], the one that is read")
    try:
        prompt = JudgePrompt(name, row["system_prompt"], row["prompt_template"])
        prompt.template.format(**dict.fromkeys(PLACES[case], ""))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        places = ", ".join("{" + place + "}" for place in PLACES[case])
        raise SetupError(f"judge.prompts={path}: {name} cannot be filled ({error!r}): use only {places}") from error
    return prompt
