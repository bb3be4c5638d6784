"""Small programming tasks with a Python solution each.

Source: CodeI/O (Li et al. 2025, arXiv 2502.07316) as reasoning-gym 0.1.25 (Apache-2.0) carries it, in
data/codeio.jsonl.gz.
Differs in: short rows in ASCII only; solutions are printed from their syntax tree without comments and docstrings, most
of which are the set's boilerplate. No solution is run.
"""

from __future__ import annotations

import ast
import functools
import gzip
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from lora_ga.data.assets import asset
from lora_ga.data.cutting import Splits, assign, first_rows, pieces
from lora_ga.data.local_recipes import normalise
from lora_ga.data.tasks import Example

SHARES = {"train": 0.82, "validation": 0.11, "test": 0.07}
# The limit on query and response: the smallest multiple of ten that leaves 1,000 rows to train on.
MAX_PIECES = 470
MAX_CHARACTERS = 3000  # of the raw row: hardly a longer one is within the limit on pieces, and parsing takes long
ALIKE = 0.8  # share of the words of two tasks: the set tells some tasks twice, with a word changed
INSTRUCTION = "Write a Python function `main_solution` for this task."  # the name all solutions of the set have


def load_code_tasks(
    sizes: Mapping[str, int | None] | None = None, *, max_pieces: int = MAX_PIECES
) -> tuple[Splits, tuple[str, ...]]:
    """Programming tasks in the splits train, validation and test.

    Args: sizes, rows per split (absent or None = all there are); max_pieces, the longest query and response kept.
    Returns: splits and notes. Fields: task, io (inputs and outputs), query (instruction, task and io), response (the
    solution in one ```python fence).
    Errors: SetupError for an unknown split, or more rows asked for than there are.
    """
    path = asset("codeio")
    note = (
        "code tasks: short CodeI/O rows of reasoning-gym 0.1.25 (Apache-2.0), comments removed, near-duplicates "
        "dropped; split by hash of the task's text"
    )
    return first_rows("code_tasks", _splits(max_pieces, path), sizes), (note,)


@functools.cache
def _splits(max_pieces: int, path: Path) -> Splits:
    """All rows by split; no two rows have the same solution or nearly the same task."""
    rows: dict[str, Example] = {}
    solutions: set[str] = set()
    tasks: list[frozenset[str]] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = _row(json.loads(line), max_pieces)
            if row is None:
                continue
            key, solution = normalise(row.fields["task"]), normalise(row.fields["response"])
            words = frozenset(key.split())
            # The bounds only save time: sets of very different sizes are never alike.
            near = (other for other in tasks if ALIKE * len(words) < len(other) < len(words) / ALIKE)
            if solution not in solutions and not any(_alike(words, other) for other in near):
                rows[key] = row
                solutions.add(solution)
                tasks.append(words)
    places = assign("code_tasks", rows, SHARES)
    return {split: tuple(rows[key] for key, place in places.items() if place == split) for split in SHARES}


def _alike(one: frozenset[str], two: frozenset[str]) -> bool:
    """Whether two sets of words share more than ALIKE of them."""
    shared = len(one & two)
    return shared > ALIKE * (len(one) + len(two) - shared)


def _row(raw: Mapping[str, str], max_pieces: int) -> Example | None:
    """A row of the set as an example, or None where it is long, not in ASCII or no Python."""
    task, code = raw["task_description"].strip(), raw["code_sample"]
    io = re.sub(r"\n\s*\n", "\n", raw["input_output_spec"].strip())
    if len(task) + len(io) + len(code) > MAX_CHARACTERS:
        return None
    try:
        solution = plain(code)
    except SyntaxError:
        return None
    query, response = f"{INSTRUCTION}\n\n{task}\n\n{io}", f"```python\n{solution}\n```"
    # A fence inside would end the answer's own.
    if not (query + response).isascii() or "```" in query + solution or pieces(query + "\n" + response) > max_pieces:
        return None
    return Example({"task": task, "io": io, "query": query, "response": response})


def plain(code: str) -> str:
    """The code printed from its syntax tree, without comments and docstrings; SyntaxError where it does not parse."""
    with warnings.catch_warnings():
        # Some strings hold escapes that Python warns of; with warnings as errors they would not parse.
        warnings.simplefilter("ignore")
        tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
