"""What is cut out of answers: canonical solutions in every wrapping, and properties over arbitrary text."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.code_answers import PRESETS, _longest, _parse, authors, extract, syntax
from eval.humaneval import load_problems
from lora_ga.data.tasks import Example
from lora_ga.errors import SetupError

PROMPT = 'import math\n\n\ndef area(r: float) -> float:\n    """ Area of a circle.\n    """\n'
PROBLEM = Example({"task_id": "x/0", "prompt": PROMPT, "entry_point": "area", "canonical_solution": "", "test": ""})
BODY = "    if r < 0:\n        return 0.0\n    return math.pi * r * r\n"
WHOLE = PROMPT + BODY

FORMS = {
    "body": BODY,
    "body, first line stripped": BODY.lstrip(),
    "body, first line after one blank": BODY[1:],
    "body, dedented": textwrap.dedent(BODY),
    "body, three blanks": textwrap.indent(textwrap.dedent(BODY), "   "),
    "body, tabs": BODY.replace("    ", "\t"),
    "body, fenced": f"```python\n{BODY}```\nDone.",
    "body, primed fence": f"{BODY}```\nIt is `pi r r`.\n```python\nreturn 1\n```",
    "body, prefaced": f"Here it is:\n{BODY}",
    "body, then prose": f"{BODY}\nThis function returns the area (see above.",
    "body, then examples": f"{BODY}\n\nprint(area())\nassert area(1) == 3",
    "body, cut short": f"{BODY}\n\ndef main(\n",
    "whole": WHOLE,
    "whole, fenced": f"Sure!\n\n```python\n{WHOLE}```\nUse it:\n```python\narea()\n```",
    "whole, capital tag": f"```Python\n{WHOLE}```",
    "whole, no tag, unclosed": f"Code:\n```\n{WHOLE}",
    "whole, primed fence": f"{WHOLE}```\n\nExplanation: done.",
    "whole, indented": textwrap.indent(WHOLE, "  "),
    "whole, first line indented": f" {WHOLE}",
    "whole, chatty": f"The answer is:\n\n{WHOLE}\nI hope that it's right.",
    "whole, then examples": f"{WHOLE}\nprint(area(-1, 2))\nif __name__ == '__main__':\n    area()\n",
    "whole, then a cut": f"{WHOLE}\ndef test():\n    assert area(",
    "definition alone": f"def area(r):\n{BODY}",
    "with a helper and a constant": "```\nPI = math.pi\nfactor: float = PI\n\ndef square(x):\n    return x * x\n\n"
    "def area(r):\n    return square(r) * factor if r > 0 else 0.0\n```",
    "a helper after the body": "    return square(r) * math.pi if r > 0 else 0.0\n\ndef square(x):\n    return x * x\n",
    "decorated": "```\nimport functools\n\n@functools.cache\ndef area(r):\n" + BODY + "```",
}


def area(completion: str) -> float:
    scope: dict = {}
    exec(PROMPT + completion, scope)
    assert scope["area"](-1) == 0.0
    return scope["area"](2.0)


@pytest.mark.parametrize("form", list(FORMS))
def test_syntax_finds_the_solution_in_every_form(form: str) -> None:
    assert area(syntax(PROBLEM, FORMS[form])) == pytest.approx(12.566, abs=1e-3)


@pytest.mark.parametrize(
    "form", ["body", "body, tabs", "whole", "whole, indented", "whole, first line indented", "definition alone"]
)
@pytest.mark.parametrize("closing", ["", "```", "\n```\n"])
def test_authors_reads_bare_code_with_a_closing_fence(form: str, closing: str) -> None:
    assert area(authors(FORMS[form] + closing)) == pytest.approx(12.566, abs=1e-3)


def test_authors_keeps_what_surrounds_the_code_and_so_fails() -> None:
    for form in ("whole, primed fence", "whole, fenced", "whole, chatty"):
        assert _parse(PROMPT + authors(FORMS[form])) is None


def test_authors_drops_docstrings_and_blank_lines_and_ranks_indentation() -> None:
    text = "def f(x):\n  \"\"\"Say\n  what.\n  \"\"\"\n\n  for y in x:\n       return y\n'''end'''"
    assert authors(text) == "def f(x):\n    for y in x:\n        return y"


def test_authors_breaks_a_bare_body_with_a_nested_function() -> None:
    # What the reading does to the canonical solutions that define one; the syntax-aware one keeps them.
    body = "    def square(x):\n        return x * x\n    return math.pi * square(r) if r > 0 else 0.0\n"
    assert authors(body).startswith("def square")
    assert area(syntax(PROBLEM, body)) == pytest.approx(12.566, abs=1e-3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot help with that.",
        "```python\n```",
        "```",
        "    x = 1\n",  # a body that returns nothing
        "Explanation",
        "def area(r):",
        "def other(r):\n    return 1\n",
        "return\x00 1",
        "    return " + "(" * 5000,
        "    return " + "-" * 50000 + "1",
        "def area(r):\n    yield = 3",
    ],
)
def test_no_solution_is_the_empty_completion(text: str) -> None:
    assert syntax(PROBLEM, text) == ""


def test_an_example_call_is_not_run() -> None:
    found = syntax(PROBLEM, "result = 3\nunused = area(1)\n" + WHOLE + "answer = area(2)\nprint(answer)\n")
    assert "print" not in found and "unused" not in found and "answer" not in found


def test_an_import_from_the_future_goes_for_it_must_stand_first() -> None:
    found = syntax(PROBLEM, "from __future__ import annotations\n" + WHOLE)
    assert "def area" in found and "__future__" not in found
    assert area(found) == pytest.approx(12.566, abs=1e-3)


def test_a_prompt_without_a_last_newline() -> None:
    problem = Example({**PROBLEM.fields, "prompt": PROMPT.rstrip("\n")})
    for text in (BODY, WHOLE):
        scope: dict = {}
        exec(problem.fields["prompt"] + syntax(problem, text), scope)
        assert scope["area"](-1) == 0.0


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(SetupError, match="use authors or syntax"):
        extract(PROBLEM, BODY, "none")


FRAGMENTS = ["```", "```python\n", "\n", "    ", "\t", '"""', "(", "return 1\n", "def area(r):\n"]
PIECES = st.lists(
    st.one_of(st.sampled_from([*FORMS.values(), *FRAGMENTS]), st.text(max_size=20)),
    max_size=6,
).map("".join)


@settings(deadline=None, max_examples=150)
@given(PIECES)
def test_whatever_the_answer_the_program_compiles(text: str) -> None:
    assert _parse(PROMPT + syntax(PROBLEM, text)) is not None
    assert isinstance(authors(text), str)


@settings(deadline=None, max_examples=150)
@given(PIECES, st.booleans())
def test_the_longest_prefix_is_the_longest_by_trying_all(text: str, after_prompt: bool) -> None:
    before, lines = PROMPT if after_prompt else "", text.splitlines()
    tried = [n for n in range(len(lines), 0, -1) if _parse(before + "\n".join(lines[:n]))]
    assert _longest(before, lines) == (tried[0] if tried else 0)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(load_problems()), st.text(alphabet=st.characters(exclude_characters="`")))
def test_prose_after_the_closing_fence_changes_nothing(problem: Example, prose: str) -> None:
    whole = problem.fields["prompt"] + problem.fields["canonical_solution"]
    assert syntax(problem, f"{whole}```\n{prose}") == syntax(problem, whole) != ""


def test_presets_are_those_that_extract_knows() -> None:
    assert {preset: bool(extract(PROBLEM, WHOLE, preset)) for preset in PRESETS} == {"authors": True, "syntax": True}
