"""Arithmetic word problems with worked answers: GSM-Symbolic templates, some of them kept for the test alone.

Source: GSM-Symbolic (Mirzadeh et al. 2024, arXiv 2410.05229) as rewritten in reasoning-gym 0.1.25 (Apache-2.0),
arithmetic/gsm_symbolic/generators_00_49.py and _50_99.py: code pinned by sha256, of which the templates listed as
checked (`tasks_ok`) run. Split `test` has the trained templates with other numbers, `new` templates never trained on.
Differs in: long rows, rows whose worked answer does not add up and answers not written as whole numbers are dropped.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

from lora_ga.data.assets import asset
from lora_ga.data.cutting import Splits, by_hash, first_rows, pieces
from lora_ga.data.tasks import Example
from lora_ga.errors import SetupError

Generator = Callable[[Random], dict[str, Any]]

# Rows of one template per split; a held-out template gives all of its rows to `new`.
SHARES = {"train": 44, "validation": 6, "test": 6}
HELD_OUT = 5  # one template in so many is never trained on
# The limit on question and answer: the smallest that leaves 50 templates to train on and 10 new ones.
MAX_PIECES = 175
DRAWS = 400  # rows drawn of a template; all but a few templates need far fewer

_NUMBER = r"[$£€]?\d[\d,]*(?:\.\d+)?"
# A sum of plain numbers and its result, not the tail of a longer one with words in it.
_EQUATION = re.compile(
    rf"(?<![\w.%*/+÷×-])(?<![x*/+÷×-] )({_NUMBER}(?:\s*[-+*/x×÷]\s*{_NUMBER})+)\s*=\s*({_NUMBER})(?!\d)"
)
_HALF_CENT = 0.0051  # worked answers round to two decimals
_OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


def load_word_problems(
    sizes: Mapping[str, int | None] | None = None, *, max_pieces: int = MAX_PIECES
) -> tuple[Splits, tuple[str, ...]]:
    """Word problems in the splits train, validation, test and new, balanced over templates in every prefix.

    Args: sizes, rows per split (absent or None = all there are); max_pieces, the longest question and answer kept.
    Returns: splits and notes. Fields: question, answer (ends in `#### n`), query (= question), template.
    Errors: SetupError for an unknown split, or more rows asked for than there are.
    """
    available = _splits(max_pieces, asset("gsm_symbolic").parent)
    trained, new = (len({row.fields["template"] for row in available[split]}) for split in ("train", "new"))
    note = (
        "word problems: GSM-Symbolic templates of reasoning-gym 0.1.25 (Apache-2.0), short rows only; not GSM8K. "
        f"Split test has the {trained} trained templates with other numbers, split new {new} never trained on"
    )
    return first_rows("word_problems", available, sizes), (note,)


@functools.cache
def _splits(max_pieces: int, cache: Path) -> Splits:
    """All rows by split; `cache` only tells one asset folder from another."""
    generators = _generators()
    # Held out of all templates, not of the short ones: the limit on length moves none from one side to the other.
    order = by_hash("word_problems", generators)
    held_out = set(order[: round(len(order) / HELD_OUT)])
    parts: dict[str, list[list[Example]]] = {split: [] for split in (*SHARES, "new")}
    wanted = sum(SHARES.values())
    for template in order:
        rows = _rows(template, generators[template], wanted, max_pieces)
        if len(rows) < wanted:
            continue
        if template in held_out:
            parts["new"].append(rows)
            continue
        for split, share in SHARES.items():
            parts[split].append(rows[:share])
            rows = rows[share:]
    return {split: _deal(split, groups) for split, groups in parts.items()}


def _deal(split: str, groups: Sequence[Sequence[Example]]) -> tuple[Example, ...]:
    """One row of every template per round, in random order: no prefix favours a template by more than one row."""
    order = Random(f"word_problems-{split}")
    return tuple(row for turn in zip(*groups, strict=True) for row in order.sample(turn, len(turn)))


def _rows(template: str, generate: Generator, wanted: int, max_pieces: int) -> list[Example]:
    """The first sound and short rows of a template, no two of them with the same numbers in the question."""
    found: dict[tuple[str, ...], Example] = {}
    for draw in range(DRAWS):
        made = generate(Random(f"word_problems-{template}-{draw}"))
        question, answer = made["question"].strip(), made["metadata"]["answer_cot"].strip()
        if pieces(f"{question}\n{answer}") <= max_pieces and _sound(question, answer, made):
            fields = {"question": question, "answer": answer, "query": question, "template": template}
            found.setdefault(tuple(re.findall(r"\d+(?:\.\d+)?", question)), Example(fields))
        if len(found) == wanted:
            break
    return list(found.values())


def _sound(question: str, answer: str, made: Mapping[str, Any]) -> bool:
    """Whether the worked answer adds up and ends in the generator's own answer, a whole number."""
    final = re.search(r"\n#### (\d+)$", answer)
    if final is None or re.search(r"\d\.\d{3}", question + answer):
        return False
    golds = {float(final[1]), float(made["answer"]), float(made["metadata"]["answer_value"])}
    return len(golds) == 1 and all(
        abs(_value(left) - _value(right)) <= _HALF_CENT for left, right in _EQUATION.findall(answer)
    )


def _value(expression: str) -> float:
    """The value of numbers joined by + - * /, products first."""
    plain = re.sub(r"[$£€,\s]", "", expression).translate(str.maketrans("x×÷", "**/"))
    total, sign = 0.0, operator.add
    for part in re.split(r"([+-])", plain):
        if part in "+-":
            sign = _OPERATORS[part]
            continue
        first, *rest = re.split(r"([*/])", part)
        product = float(first)
        for symbol, factor in zip(rest[::2], rest[1::2], strict=True):
            product = _OPERATORS[symbol](product, float(factor))
        total = sign(total, product)
    return total


def _generators() -> dict[str, Generator]:
    """The template functions that their authors list as checked, by number."""
    found = {}
    for module in _modules():
        for name, function in vars(module).items():
            if name.startswith("generate_"):
                found[name.removeprefix("generate_")] = function
    return {str(number): found[str(number)] for number in _checked()}


def _checked() -> list[int]:
    for node in ast.parse(asset("gsm_symbolic").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "tasks_ok":
            return list(ast.literal_eval(node.value))
    raise SetupError("reasoning-gym's gsm_symbolic.py lists no tasks_ok: the pinned package changed, report it")


def _modules() -> list[ModuleType]:
    """Run the two generator files from the cache.

    They import `reasoning_gym.utils`. That name stands for the pinned file while they load and means again afterwards
    what it meant before, so that the package, which needs eleven others, need not be installed.
    """
    names = ("reasoning_gym", "reasoning_gym.utils")
    before = {name: sys.modules.get(name) for name in names}
    try:
        sys.modules["reasoning_gym"] = ModuleType("reasoning_gym")
        sys.modules["reasoning_gym.utils"] = _run("gym_numbers")
        return [_run("gsm_symbolic_00_49"), _run("gsm_symbolic_50_99")]
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def _run(name: str) -> ModuleType:
    path = asset(name)
    spec = importlib.util.spec_from_loader(f"lora_ga_asset_{name}", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Compiled here and not by an import: that would leave, and later trust, byte code beside the pinned file.
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    return module
