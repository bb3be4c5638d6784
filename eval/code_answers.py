"""What of a model's answer is its solution of a HumanEval problem: the completion that is put after the stub.

`authors`: as Outsider565/LoRA-GA reproduce/eval_humaneval.py (LoRA-Pro and LoRA-One alike): fences, docstrings and
blank lines go, whatever surrounds the code stays, and lines are re-indented by rank. `syntax`: what the parser accepts,
which finds the code in chatter and cuts what follows it; the answer is only parsed, never run, so it knows no verdict.
Differs in: LoRA-GA's reading breaks a bare body that holds a nested function; `authors` keeps that.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence

from lora_ga.data.tasks import Example
from lora_ga.errors import SetupError

PRESETS = ("authors", "syntax")
INDENT = "    "
FENCE = re.compile(r"```(?:(?:python3?|py)\b|\w+(?=\n))?[ \t]*\n?", re.IGNORECASE)
DOCSTRING = re.compile(r'"{3}.*?"{3}|\'{3}.*?\'{3}', re.DOTALL)
# compile() raises the last three on text that is nested too deeply or holds numbers too large.
NOT_CODE = (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError)


def extract(problem: Example, text: str, preset: str) -> str:
    """The completion in a model's answer, read by a preset; SetupError for a preset other than PRESETS."""
    if preset not in PRESETS:
        raise SetupError(f"unknown post_process {preset!r}: use {' or '.join(PRESETS)}")
    return authors(text) if preset == "authors" else syntax(problem, text)


def authors(text: str) -> str:
    """Code without fences, docstrings and blank lines; the first `def` moves to column 0, each depth beyond it is one
    level of four spaces."""
    bare = DOCSTRING.sub("", text.replace("```", "").replace("\t", INDENT))
    lines = [line.rstrip() for line in bare.splitlines() if line.strip()]
    margin = next((_width(line) for line in lines if "def" in line), 0)
    deeper = sorted({_width(line) for line in lines if _width(line) > margin})
    levels = {width: level for level, width in enumerate(deeper, start=1)}
    return "\n".join(INDENT * levels.get(_width(line), 0) + line.lstrip() for line in lines)


def syntax(problem: Example, text: str) -> str:
    """The solution as far as it parses: a whole definition with what it uses, else the body of the stub; "" if none.

    Text is divided at fences, closed or not; the first part that holds a solution counts. Prompt and result together
    always compile if the prompt does.
    """
    parts = [re.sub(r"^[ \t]+", lambda match: match[0].expandtabs(4), part, flags=re.M) for part in FENCE.split(text)]
    for read in (_definition, _body):
        for part in parts:
            found = read(problem, part.splitlines())
            if found:
                return found
    return ""


def _width(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _tree(source: str) -> ast.Module:
    """The tree of source that compiles; the parser alone would let a `return` outside a function pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile(source, "<answer>", "exec", dont_inherit=True)
        return ast.parse(source)


def _parse(source: str) -> ast.Module | None:
    try:
        return _tree(source)
    except NOT_CODE:
        return None


def _longest(before: str, lines: Sequence[str]) -> int:
    """How many of the lines, from the first, still compile after `before`, which ends a line; 0 if none."""
    end = len(lines)
    while end:
        try:
            _tree(before + "\n".join(lines[:end]))
            break
        except SyntaxError as error:
            # Whatever stands there is read the same in every prefix that holds it, so it fails in all of them.
            end = min(end, max(1, (error.lineno or end) - before.count("\n"))) - 1
        except NOT_CODE:
            end -= 1
    return end


def _functions(tree: ast.Module, name: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    ]


def _names(nodes: Sequence[ast.AST]) -> set[str]:
    return {part.id for node in nodes for part in ast.walk(node) if isinstance(part, ast.Name)}


def _kept(nodes: Sequence[ast.stmt], users: Sequence[ast.stmt] = ()) -> Iterator[int]:
    """Line numbers of imports, definitions and the assignments these use: calls of the solution are examples."""
    lasting = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    # After the stub an import from the future is an error, and what it would allow is there already.
    kept: list[ast.stmt] = [
        node for node in nodes if isinstance(node, lasting) and getattr(node, "module", None) != "__future__"
    ]
    rest = [node for node in nodes if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)]
    while used := [node for node in rest if _names([*kept, *users]) & _names(_targets(node))]:
        kept += used
        rest = [node for node in rest if node not in used]
    for node in kept:
        first = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", []))])
        yield from range(first, (node.end_lineno or node.lineno) + 1)


def _targets(node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def _definition(problem: Example, lines: Sequence[str]) -> str:
    """A definition of the entry point with the imports, helpers and constants around it; "" if there is none."""
    name = problem.fields["entry_point"]
    opening = re.compile(rf"(?:async +)?def +{re.escape(name)}\b")
    at = next((i for i, line in enumerate(lines) if opening.match(line.lstrip())), None)
    if at is None:
        return ""
    margin = _width(lines[at])
    shifted = [line[min(margin, _width(line)) :] for line in lines]
    end = at + _longest("", shifted[at:])
    if end == at:
        return ""
    # From the earliest line that still parses: chatter before the code does not, imports and decorators do.
    start = next(i for i in range(at + 1) if _parse("\n".join(shifted[i:end])))
    tree = _parse("\n".join(shifted[start:end]))
    if tree is None or not _functions(tree, name):
        return ""
    code = "\n".join(shifted[start + i - 1] for i in sorted(set(_kept(tree.body))))
    return _compiled(problem, code)


def _compiled(problem: Example, code: str) -> str:
    """The completion if it compiles after the prompt too, not only by itself."""
    prompt = problem.fields["prompt"]
    completion = ("" if prompt.endswith("\n") else "\n") + code + "\n"
    return completion if _parse(prompt + completion) else ""


def _returns(nodes: Iterable[ast.AST]) -> bool:
    """Whether one of the nodes returns or yields, not counting functions defined within."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    return any(
        isinstance(node, ast.Return | ast.Yield | ast.YieldFrom)
        or (not isinstance(node, inner) and _returns(ast.iter_child_nodes(node)))
        for node in nodes
    )


def _indentations(lines: Sequence[str]) -> Iterator[list[str]]:
    """The lines as they are, and as they should be if the first one, or all, lost or gained blanks, or are prefaced."""
    yield list(lines)
    first = next((i for i, line in enumerate(lines) if line.strip()), 0)
    yield [*lines[:first], *(INDENT + line.lstrip() for line in lines[first : first + 1]), *lines[first + 1 :]]
    yield textwrap.indent(textwrap.dedent("\n".join(lines)), INDENT).split("\n")
    indented = next((i for i, line in enumerate(lines) if line.startswith(" ") and line.strip()), 0)
    if not any(re.match(r"(?:async +)?def\b|class\b", line) for line in lines[:indented]):  # another function's body
        yield list(lines[indented:])


def _body(problem: Example, lines: Sequence[str]) -> str:
    """The longest continuation of the stub that parses and returns something, over the ways to indent it."""
    bodies = [_continuation(problem, candidate) for candidate in _indentations(lines)]
    return max(bodies, key=lambda body: sum(bool(line.strip()) for line in body.splitlines()))


def _continuation(problem: Example, lines: Sequence[str]) -> str:
    prompt, name = problem.fields["prompt"], problem.fields["entry_point"]
    prompt += "" if prompt.endswith("\n") else "\n"
    stub = prompt.count("\n")
    tree = _parse(prompt + "\n".join(lines[: _longest(prompt, lines)]))
    functions = _functions(tree, name) if tree else []
    if not tree or not functions:
        return ""
    entry = functions[-1]
    added = [node for node in entry.body if node.lineno > stub]
    if not _returns(added):
        return ""
    stop = entry.end_lineno or stub
    after = [node for node in tree.body if node.lineno > stop]
    extra = (lines[i - stub - 1] for i in sorted(set(_kept(after, [entry]))))
    return _compiled(problem, "\n".join([*lines[: stop - stub], *extra]))
