"""The rows of one run under its protocol: what it trains on, and what it is scored on without generating."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.config import RunConfig
from lora_ga.data.encoding import Collator, EncodedRow, EncodedRows, encode_rows
from lora_ga.data.selection import select_rows
from lora_ga.data.tasks import Example, TaskData, fill, load_task, render
from lora_ga.errors import SetupError
from lora_ga.models import Loaded, load_tokenizer
from lora_ga.records import content_hash

Pairs = list[tuple[str, str]]  # (prompt, target)


@dataclass(frozen=True)
class Rows:
    """Training rows and rows to score as (prompt, target); `gold` holds their labels where the task has labels.

    `description` is what the record says of the data.
    """

    train: Pairs
    scored: Pairs
    gold: list[int]
    description: dict[str, Any]

    @classmethod
    def load(cls, config: RunConfig) -> Rows:
        """Read the task and put the protocol's prompt around each row."""
        task = config.task
        data = load_task(task.source, task.name, sizes=task.sizes, data_root=task.data_root)
        rows = _labelled(config, data) if task.kind == "classification" else _in_words(config, data)
        for split, found in (("train", rows.train), (config.eval.split, rows.scored)):
            if not found:
                raise SetupError(f"task={task.name} has no {split} rows: set task.sizes.{split} to a number, or null")
        return rows


def _labelled(config: RunConfig, data: TaskData) -> Rows:
    template, words, labels = config.prompt.template, config.prompt.labels, len(data.labels)
    of = data.splits[config.eval.split]
    scored = of[: config.eval.limit]
    gold = [row.label for row in scored if row.label is not None]
    description = {
        "train": {"n": len(data.splits["train"]), "sha256": data.fingerprint("train")},
        "scored": {
            "split": config.eval.split,
            "n": len(scored),
            "of": len(of),
            "sha256": data.fingerprint(config.eval.split),
        },
        "majority_rate": max((gold.count(label) for label in set(gold)), default=0) / max(1, len(gold)),
        "labels": list(words),
        "notes": list(data.notes),
    }
    return Rows(
        train=[render(template, words, row, label_count=labels) for row in data.splits["train"]],
        scored=[render(template, words, row, label_count=labels) for row in scored],
        gold=gold,
        description=description,
    )


def _in_words(config: RunConfig, data: TaskData) -> Rows:
    """Rows whose loss is reported come from eval.split, or from validation where the task has no test rows."""
    prompt, task = config.prompt, config.task
    target = prompt.target
    if target is None:
        raise SetupError(f"protocol={config.protocol.name} gives no target for task={task.name}: add prompts.*.target")

    def pair(row: Example) -> tuple[str, str]:
        return fill(prompt.template, row), fill(target, row)

    selection = select_rows(
        data.splits,
        render=pair,
        rule=prompt.rule(task.max_tokens),
        sizes=task.sizes,
        tokenizer=load_tokenizer(config.model),
    )
    split = config.eval.split if selection.splits.get(config.eval.split) else "validation"
    train, of = selection.splits["train"], selection.splits.get(split, [])
    scored = of[: config.eval.limit]
    description = {
        "train": {"n": len(train), "sha256": content_hash(train, 16)},
        "scored": {"split": split, "n": len(scored), "of": len(of), "sha256": content_hash(of, 16)},
        "selection": selection.report,
        "notes": list(data.notes),
    }
    return Rows(train=train, scored=scored, gold=[], description=description)


@dataclass(frozen=True)
class Encoded:
    """Rows as token ids: training rows, and for a task answered in words those whose loss is reported."""

    train: EncodedRows
    held_out: list[EncodedRow]
    collator: Collator

    @classmethod
    def of(cls, config: RunConfig, loaded: Loaded, rows: Rows) -> Encoded:
        """Encode for the model's architecture; T5's first decoder token comes from its configuration."""
        kind, length = config.model.architecture, config.task.max_length
        start = getattr(loaded.model.config, "decoder_start_token_id", None)
        held_out = rows.scored if config.task.kind == "generation" else []
        return cls(
            train=EncodedRows(encode_rows(loaded.tokenizer, rows.train, kind, length)),
            held_out=encode_rows(loaded.tokenizer, held_out, kind, length),
            collator=Collator(kind, loaded.tokenizer.pad_token_id, start),
        )
