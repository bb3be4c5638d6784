"""MT-Bench: questions, answers under a conversation template that is named, and FastChat's answer files.

Source: Zheng et al., NeurIPS 2023; formats and loop of FastChat's llm_judge (gen_model_answer.py, common.py).
Differs in: the template is never guessed from the model's name (FastChat issues 1826, 2865: wrong template, no word of
it); all first turns go in one batch, then all second turns; an answer is cut at the template's stop strings wherever
they stand, there only behind its first character; ids are hashes and time stamps 0, so equal answers give equal files.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastchat.conversation import Conversation, conv_templates, get_conv_template

from eval.judge import safe_name
from lora_ga.errors import SetupError
from lora_ga.records import content_hash, write_atomic

log = logging.getLogger(__name__)

HUB_SPACE = "lmsys/mt-bench"
# FastChat's folder (and the hub space's), then a flat mirror; GPT-4's answers to the questions that have one solution.
REFERENCES = ("reference_answer/gpt-4.jsonl", "reference_answer_gpt-4.jsonl")
WITH_REFERENCE = ("math", "reasoning", "coding")  # common.py, NEED_REF_CATS
# content_hash of the 80 published questions, by `fingerprint`; the space has no release to pin.
PUBLISHED = "7806f4b5e1fd92de"
# llm_judge/common.py, temperature_config; gen_model_answer.py uses OTHER_TEMPERATURE for any other category.
FASTCHAT_TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7

Complete = Callable[[list[str], float | None], list[str]]


@dataclass(frozen=True)
class Question:
    """One question of one or two turns; `reference` holds the reference answers to its turns, where there are any."""

    question_id: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A model's answers to the turns of one question."""

    question_id: int
    turns: tuple[str, ...]


def load_questions(
    data_root: str | None = None, limit: int | None = None, *, references: str | None = None
) -> list[Question]:
    """Read the questions from `<root>/mt_bench/question.jsonl`, or from the hub space where there is no root.

    Args: data_root, else $LORA_GA_DATA_ROOT; limit, only the first ones; references, a file of reference answers to use
    instead of GPT-4's (of which 13 of 30 are wrong in a turn: FastChat issue 3158). A mirror may lack them.
    Errors: SetupError for a missing or damaged file, or a hub that cannot be reached.
    """
    root = data_root or os.environ.get("LORA_GA_DATA_ROOT")
    question_file, found = _mirror(Path(root).expanduser()) if root else _hub()
    chosen = Path(references).expanduser() if references else found
    solutions = {answer.question_id: answer.turns for answer in read_answers(chosen)} if chosen else {}
    questions = []
    for number, row in _rows(question_file):
        try:
            question = Question(int(row["question_id"]), str(row["category"]), tuple(map(str, row["turns"])))
        except (KeyError, TypeError, ValueError) as error:
            raise SetupError(_damaged(question_file, number, error)) from error
        reference = solutions.get(question.question_id, ()) if question.category in WITH_REFERENCE else ()
        questions.append(replace(question, reference=reference))
    ids = {question.question_id for question in questions}
    if not questions or len(ids) < len(questions) or not all(1 <= len(q.turns) <= 2 for q in questions):
        raise SetupError(
            f"{question_file} must hold questions of one or two turns, each id once: fetch FastChat's file"
        )
    if not chosen:
        log.warning(
            "%s has no reference answers beside it: math, reasoning and coding are judged without", question_file
        )
    if not root and fingerprint(questions) != PUBLISHED:
        log.warning("the questions of %s are not those this was tested with; their fingerprint is recorded", HUB_SPACE)
    return questions[:limit]


def _mirror(root: Path) -> tuple[Path, Path | None]:
    folder = root / "mt_bench"
    if not (folder / "question.jsonl").is_file():
        raise SetupError(
            f"{folder / 'question.jsonl'} is missing: put FastChat's file there, or unset data_root to use the hub"
        )
    return folder / "question.jsonl", next((folder / name for name in REFERENCES if (folder / name).is_file()), None)


def _hub() -> tuple[Path, Path | None]:
    import huggingface_hub

    try:
        files = [
            huggingface_hub.hf_hub_download(HUB_SPACE, f"data/mt_bench/{name}", repo_type="space")
            for name in ("question.jsonl", REFERENCES[0])
        ]
    except Exception as error:  # the hub client raises many kinds for one cause: not reachable
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SetupError(
            f"cannot load MT-Bench's questions from the hub space {HUB_SPACE} ({reason}): "
            "set data_root or LORA_GA_DATA_ROOT to a folder with mt_bench/question.jsonl"
        ) from error
    return Path(files[0]), Path(files[1])


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise SetupError(f"{path} cannot be read ({error}): give a file in FastChat's JSONL format") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except ValueError as error:
                raise SetupError(_damaged(path, number, error)) from error
    return rows


def _damaged(path: Path, number: int, error: Exception) -> str:
    return f"{path}, line {number}, is not a row in FastChat's format ({error!r}): fetch the file again"


def fingerprint(questions: Sequence[Question]) -> str:
    """16 hex digits of the sha256 of the questions, in order, without their references."""
    return content_hash([[q.question_id, q.category, list(q.turns)] for q in questions], 16)


def conversation(name: str) -> Conversation:
    """A fresh conversation under one of FastChat's templates; SetupError names near ones if there is none."""
    # Those without a style (chatgpt, gemini, ...) stand for models behind an API and make no prompt.
    usable = [known for known, template in conv_templates.items() if template.sep_style is not None]
    if name not in usable:
        near = difflib.get_close_matches(name, usable, n=5, cutoff=0.4) or sorted(usable)
        raise SetupError(f"FastChat has no prompt template {name!r}: use one like {', '.join(near)}")
    return get_conv_template(name)


def stop_strings(name: str) -> tuple[str, ...]:
    """The strings at which an answer under this template ends, beside the model's own end of text.

    A template's stop_token_ids belong to one tokenizer, whose end-of-text token the model's config names already.
    """
    stop = conversation(name).stop_str
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def answer_questions(
    questions: Sequence[Question],
    template: str,
    complete: Complete,
    *,
    turns: Literal[1, 2],
    temperatures: Mapping[str, float] | None = None,
) -> list[Answer]:
    """Have a model answer every question, the second turn with its own first answer in the history.

    Args: template, a FastChat template's name; complete(prompts, temperature) gives one completion per prompt, with
    temperature None meaning the caller's own decoding; temperatures by category (FASTCHAT_TEMPERATURES), if wanted:
    then there is one call per turn and temperature, else one per turn.
    Returns: answers in the order of the questions. Errors: SetupError for an unknown template.
    """
    stops = stop_strings(template)
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(turns):
        groups: dict[float | None, list[int]] = {}
        for i, question in enumerate(questions):
            if turn < len(question.turns):
                own = temperatures.get(question.category, OTHER_TEMPERATURE) if temperatures is not None else None
                groups.setdefault(own, []).append(i)
        for temperature, members in groups.items():
            prompts = [_prompt(template, questions[i], answers[i]) for i in members]
            for i, text in zip(members, complete(prompts, temperature), strict=True):
                answers[i].append(_cut(text, stops))
    return [Answer(q.question_id, tuple(given)) for q, given in zip(questions, answers, strict=True)]


def _prompt(template: str, question: Question, given: Sequence[str]) -> str:
    talk = conversation(template)
    for asked, answer in zip(question.turns, [*given, None], strict=False):
        talk.append_message(talk.roles[0], asked)
        talk.append_message(talk.roles[1], answer)
    return talk.get_prompt()


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))].strip()


def write_answers(answers: Sequence[Answer], folder: Path, model_id: str) -> Path:
    """Write `<folder>/model_answer/<model>.jsonl` in FastChat's format, by question id."""
    name = safe_name(model_id)
    rows = [
        {
            "question_id": answer.question_id,
            "answer_id": content_hash([name, answer.question_id, list(answer.turns)], 22),
            "model_id": name,
            "choices": [{"index": 0, "turns": list(answer.turns)}],
            "tstamp": 0.0,
        }
        for answer in sorted(answers, key=lambda answer: answer.question_id)
    ]
    return write_atomic(folder / "model_answer" / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def read_answers(path: Path) -> list[Answer]:
    """The first choice of every row of an answer file, ours or FastChat's; SetupError for a damaged one."""
    answers = []
    for number, row in _rows(path):
        try:
            answers.append(Answer(int(row["question_id"]), tuple(map(str, row["choices"][0]["turns"]))))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise SetupError(_damaged(path, number, error)) from error
    return answers
