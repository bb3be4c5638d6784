"""GSM8K answers read three ways side by side: the last marked one, the last number, and as the papers' code does.

Strict: the last "#### <number>" (gold's format, Cobbe et al. 2021, arXiv 2110.14168); other markers, such as MetaMath's
"The answer is:", only where a protocol trains on them. Flexible: the last number (both as in lm-evaluation-harness).
Authors: Outsider565/LoRA-GA reproduce/eval_gsm8k.py, the same in LoRA-Pro and LoRA-One: first `####\\s*(\\d+)`, so that
1,080 is 1 and 2.5 is 2, for gold too; without a match (-5, $18) 0, so that a miss is right where gold reads as 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

from eval.base import load_metric
from lora_ga.errors import SetupError

GOLD_MARKERS = ("####",)
EXTRACTORS = ("strict", "flexible", "authors")

_MINUS = "\u2212\ufe63\uff0d"  # minus sign, small and full-width hyphen-minus
_VULGAR = {c: f" {n}/{d}" for c, n, d in zip("½⅓⅔¼¾⅕⅛", (1, 1, 2, 1, 3, 1, 1), (2, 3, 3, 4, 4, 5, 8), strict=True)}
_PLAIN = str.maketrans({**dict.fromkeys(_MINUS, "-"), **_VULGAR, "\u2044": "/"})

_SEPARATOR = r"(?:,|\{,\}|\\,|[\u00a0\u2009\u202f])"  # of thousands, in text and LaTeX
# Atomic: a number is read whole or not at all, never as the first digits of a longer one.
_WHOLE = rf"(?>[0-9]{{1,3}}(?:{_SEPARATOR}[0-9]{{3}})++(?![0-9])|[0-9]++)"
_SIGN = r"(?:(?<![\w)\]}%])(?<![0-9)\]}%] )[-+])?"  # in "10-15", "10 -15" and "2x-3" the hyphen is no sign
_CURRENCY = r"(?:(?:\\?\$|[€£¥₹₩]|\b(?:USD|EUR|GBP|Rs)(?![A-Za-z])\.?) ?)?"
_START, _END = r"(?<![0-9])(?<![0-9]\.)", r"(?![.,]?[0-9])"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN}){_CURRENCY}(?P<inner>{_SIGN}){_START}(?:"
    rf"(?:(?P<mixed>{_WHOLE}) *)?\\[dt]?frac\{{ *(?P<top>{_WHOLE}) *\}}\{{ *(?P<bottom>0*[1-9][0-9]*) *\}}"
    rf"|(?:(?P<plain_mixed>{_WHOLE}) +)?(?P<over>{_WHOLE}) ?/ ?(?P<under>(?>0*[1-9][0-9]*+)){_END}"
    rf"|(?P<decimal>(?>(?:{_WHOLE})?\.[0-9]++|{_WHOLE})){_END}"
    r")"
)
# What may stand between a marker and its number: blanks, an equals sign or colon, and the marks of Markdown and LaTeX.
_DECORATION = r"(?:[ \t:=*_`~(\[{]|\\[(\[]|\\boxed\b|\\text\b|(?<!\\)\$(?=\\))*+"


def _fraction(match: re.Match[str]) -> Fraction | None:
    def number(name: str) -> Fraction:
        return Fraction(re.sub(_SEPARATOR, "", match[name] or "0"))

    try:
        if match["top"]:
            size = number("mixed") + number("top") / number("bottom")
        elif match["over"]:
            size = number("plain_mixed") + number("over") / number("under")
        else:
            size = number("decimal")
    except ValueError:  # more digits than Python turns into a number: a model that repeats one for ever
        return None
    return -size if "-" in (match["sign"], match["inner"]) else size


@cache
def _marked(markers: tuple[str, ...]) -> re.Pattern[str]:
    if not markers or not all(markers):
        raise SetupError("the strict extractor has no marker: name at least one, such as '####'")
    return re.compile("|".join(re.escape(marker) for marker in markers))


def strict_answer(text: str, markers: tuple[str, ...] = GOLD_MARKERS) -> Fraction | None:
    """The number after the last marker that a number follows in the same line, or None.

    Between them only blanks, a currency, an equals sign and Markdown or LaTeX marks may stand; what comes after the
    number (a unit, a percent sign, a full stop) is not read. SetupError without a marker.
    """
    text = text.translate(_PLAIN)
    answer = None
    for marker in _marked(tuple(markers)).finditer(text):
        line = text[marker.end() :].partition("\n")[0]
        line = re.sub(rf"^({_DECORATION}[-+])[ \t]+", r"\1", re.sub(rf"^{_DECORATION}", "", line))
        number = _NUMBER.match(line)
        if number is not None:
            answer = _fraction(number)
    return answer


def flexible_answer(text: str) -> Fraction | None:
    """The last number of the text, wherever it stands, or None."""
    numbers = list(_NUMBER.finditer(text.translate(_PLAIN)))
    return _fraction(numbers[-1]) if numbers else None


def authors_answer(text: str) -> int:
    """What the three papers' code reads: digits after the first "####", else 0."""
    match = re.search(r"####\s*(\d+)", text)
    try:
        return int(match[1]) if match else 0
    except ValueError:  # theirs turns whatever int() refuses into 0
        return 0


def read_answer(answer: str, gold: str, *, markers: tuple[str, ...] = GOLD_MARKERS) -> dict[str, Any]:
    """One answer as each extractor reads it, for the log of generations.

    Returns `gold`, `gold_authors`, and for each extractor its reading and `<extractor>_correct`; numbers are exact text
    ("18", "5/2"), "" where none was found. SetupError if `gold` does not hold "#### <number>".
    """
    number = strict_answer(gold)
    if number is None:
        raise SetupError(f"the gold answer {gold[-60:]!r} has no '#### <number>': use GSM8K's format")
    readings = {
        "strict": strict_answer(answer, markers),
        "flexible": flexible_answer(answer),
        "authors": authors_answer(answer),
    }
    right = {"strict": number, "flexible": number, "authors": authors_answer(gold)}
    return {
        "gold": str(number),
        "gold_authors": str(right["authors"]),
        **{name: "" if value is None else str(value) for name, value in readings.items()},
        **{f"{name}_correct": value == right[name] for name, value in readings.items()},
    }


def _samples(answers: Sequence[str] | Sequence[Sequence[str]]) -> Iterator[list[str]]:
    for answer in answers:
        yield [answer] if isinstance(answer, str) else list(answer)


def score(
    answers: Sequence[str] | Sequence[Sequence[str]], gold: Sequence[str], *, markers: tuple[str, ...] = GOLD_MARKERS
) -> dict[str, dict[str, float]]:
    """A record's metrics of answers to GSM8K problems: each {"value", "n"}, n the number of problems.

    Args:
        answers: one text a problem, or several samples of each, whose scores are averaged.
        gold: the problems' answers, ending in "#### <number>".
        markers: what announces an answer to the strict extractor.
    Returns:
        strict, flexible, authors: share of right answers. parse_failures: share in which strict finds no number;
        parse_failures_flexible: share without any number.
    ValueError if there is nothing to score or the lengths differ; SetupError for a gold answer without a number.
    """
    samples = list(_samples(answers))
    if not samples or len(samples) != len(gold) or not all(samples):
        raise ValueError(f"cannot score the answers to {len(samples)} problems against {len(gold)} gold answers")
    rows = [
        [read_answer(text, right, markers=markers) for text in texts]
        for texts, right in zip(samples, gold, strict=True)
    ]
    metric = load_metric("math_answers")
    values = {
        name: metric.compute(
            predictions=[[row[name] for row in row_samples] for row_samples in rows],
            references=[row_samples[0]["gold_authors" if name == "authors" else "gold"] for row_samples in rows],
        )
        for name in EXTRACTORS
    }
    shares = {
        **{name: values[name]["accuracy"] for name in EXTRACTORS},
        "parse_failures": values["strict"]["parse_failures"],
        "parse_failures_flexible": values["flexible"]["parse_failures"],
    }
    return {name: {"value": share, "n": len(gold)} for name, share in shares.items()}
