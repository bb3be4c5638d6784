"""The instruction sets of the papers' Llama 2-7B tables and GSM8K, from the hub or from a mirror folder.

Source: LoRA-GA, LoRA-Pro and LoRA-One, reproduce/data.py (load_meta_math, load_codefeedback, load_wizardlm): which
rows of which set count. Their limits on length and number are selection.py's. A mirror (`data_root`, else
`$LORA_GA_DATA_ROOT`) holds `<root>/<name>/*.jsonl` (or json, or parquet) with the hub's columns.
Differs in: the hub's revision is pinned where it is known; Alpaca is the cleaned set LoRA-One used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from lora_ga.cache import cache_folder
from lora_ga.data.tasks import Example
from lora_ga.errors import SetupError

if TYPE_CHECKING:
    from datasets import Dataset

FENCE = "```"
ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator calls: "48/2 = <<48/2=24>>24"
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # file suffix -> reader of `datasets`
TEXT = ("string", "large_string")  # dtypes of `datasets`
Fields = dict[str, str]


def metamath_fields(row: Mapping[str, str]) -> Fields:
    """query; response, whole; reasoning, the response cut before "The answer is:" (its "#### n" line stays)."""
    response = row["response"]
    return {"query": row["query"], "response": response, "reasoning": response.split("\nThe answer is:")[0]}


def code_fields(row: Mapping[str, str]) -> Fields:
    """query; response, the whole answer; first_block, the answer up to the end of its first fenced block.

    A block that the answer never closes is closed, as in the authors' code.
    """
    answer = row["answer"]
    before, block, *_ = answer.split(FENCE, 2)
    return {"query": row["query"], "response": answer, "first_block": f"{before}{FENCE}{block}{FENCE}"}


def wizard_fields(row: Mapping[str, str]) -> Fields:
    """query and response: the English columns, beside which the set has instruction_zh and output_zh."""
    return {"query": row["instruction"], "response": row["output"]}


def alpaca_fields(row: Mapping[str, str]) -> Fields:
    """query and response; a row's input follows its instruction under the heading of Alpaca's prompt with input."""
    query = f"{row['instruction']}\n\n### Input:\n{row['input']}" if row["input"] else row["instruction"]
    return {"query": query, "response": row["output"]}


def gsm8k_fields(row: Mapping[str, str]) -> Fields:
    """question, and query, the same; answer, and response, the same; reasoning, the answer without annotations."""
    question, answer = row["question"], row["answer"]
    plain = ANNOTATION.sub("", answer)
    return {"question": question, "query": question, "answer": answer, "response": answer, "reasoning": plain}


def _of_gsm8k(kind: str) -> bool:
    return "GSM" in kind


def _has_block(answer: str) -> bool:
    return FENCE in answer


def _is_no_refusal(output: str) -> bool:
    return not any(words in output.lower() for words in ("sorry", "as an ai"))


@dataclass(frozen=True)
class Source:
    """One set: hub id, configuration and revision; mirror folder; needed columns, and those that may be empty.

    `keep` says by one column which rows count, `rule` the same in words.
    """

    hub: str
    revision: str
    folder: str
    columns: tuple[str, ...]
    fields: Callable[[Mapping[str, str]], Fields]
    config: str | None = None
    optional: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train",)
    keep: tuple[str, Callable[[str], bool]] | None = None
    rule: str = ""


# Revisions: the hub's main before the papers or unchanged since; each is pinned alike by several public projects
# (MetaMathQA's by PEFT's method_comparison records, GSM8K's by lighteval). No paper names one. For WizardLM none is
# known, so what the hub has today is read.
METAMATH = ("meta-math/MetaMathQA", "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18", "metamath")
SOURCES: Mapping[str, Source] = {
    "metamath": Source(
        *METAMATH, ("query", "response", "type"), metamath_fields,
        keep=("type", _of_gsm8k), rule="type contains GSM",
    ),
    "metamath_full": Source(*METAMATH, ("query", "response"), metamath_fields),
    "code_feedback": Source(
        "m-a-p/CodeFeedback-Filtered-Instruction", "a08c213a9748c66c15d0225814be80a2e77adf4a", "code_feedback",
        ("query", "answer"), code_fields,
        keep=("answer", _has_block), rule="the answer has a fenced block",
    ),
    "wizardlm": Source(
        "silk-road/Wizard-LM-Chinese-instruct-evol", "main", "wizardlm", ("instruction", "output"), wizard_fields,
        keep=("output", _is_no_refusal), rule='the answer has neither "sorry" nor "as an AI"',
    ),
    "alpaca": Source(
        "yahma/alpaca-cleaned", "12567cabf869d7c92e573c7c783905fc160e9639", "alpaca",
        ("instruction", "output"), alpaca_fields, optional=("input",),
    ),
    "gsm8k": Source(
        "openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", "gsm8k", ("question", "answer"), gsm8k_fields,
        config="main", splits=("train", "test"),
    ),
}  # fmt: skip


class Pool(Sequence[Example]):
    """Rows of one split, made into examples when asked for: MetaMathQA's 395,000 stay in their Arrow file."""

    def __init__(self, source: Source, rows: Dataset) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self._example(self.rows[range(len(self))[index]])

    def __iter__(self) -> Iterator[Example]:
        return map(self._example, self.rows)

    def _example(self, row: Mapping[str, Any]) -> Example:
        return Example(self.source.fields({**row, **{name: row.get(name) or "" for name in self.source.optional}}))


def load_instructions(name: str, *, data_root: str | None = None) -> tuple[dict[str, Pool], tuple[str, ...]]:
    """Open one set.

    Args: data_root, the mirror folder (None = `$LORA_GA_DATA_ROOT`, else the hub).
    Returns: the rows that count by split, in the order of the source, and the notes that belong under any table.
    Errors: SetupError naming the file or column expected, or the setting that avoids the hub.
    """
    if name not in SOURCES:
        raise SetupError(f"unknown instruction set {name!r}: use one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    root = data_root or os.environ.get("LORA_GA_DATA_ROOT")
    loaded, origin = _read_mirror(source, Path(root)) if root else _read_hub(source)
    notes = [f"{name}: read from {origin}"]
    pools = {}
    for split, rows in loaded.items():
        kept = _kept(source, rows, f"{name} ({origin})")
        if len(kept) < len(rows):
            notes.append(f"{name}: {len(kept)} of {len(rows)} {split} rows count, where {source.rule}")
        pools[split] = Pool(source, kept)
    return pools, tuple(notes)


def _kept(source: Source, rows: Dataset, where: str) -> Dataset:
    needed = (*source.columns, *source.optional)
    absent = [column for column in source.columns if column not in rows.column_names]
    if absent:
        found = ", ".join(rows.column_names)
        raise SetupError(f"{where} has no column {absent[0]!r}, only {found}: use the files of {source.hub}")
    other = [column for column in source.columns if getattr(rows.features[column], "dtype", None) not in TEXT]
    if other:
        raise SetupError(f"{where} has a column {other[0]!r} that is not text: use the files of {source.hub}")
    rows = rows.select_columns([column for column in needed if column in rows.column_names])
    for column in source.columns:
        empty = rows.data.column(column).null_count
        if empty:
            raise SetupError(f"{where} has {empty} rows without {column}: fetch the files of {source.hub} again")
    if source.keep is None:
        return rows
    column, rule = source.keep
    # In memory: a row's number is all that is stored, and no cache file can grow stale.
    return rows.filter(rule, input_columns=[column], keep_in_memory=True)


def _read_mirror(source: Source, root: Path) -> tuple[dict[str, Dataset], str]:
    folder = root / source.folder
    loaded = {split: _read_files(_files(source, folder, split)) for split in source.splits}
    return loaded, "a mirror folder"


def _files(source: Source, folder: Path, split: str) -> list[Path]:
    """The files of a split: all there are for a set with one split, those named after it otherwise."""
    found = sorted(path for path in folder.glob("*") if path.suffix in KINDS and not path.name.startswith("."))
    if len(source.splits) > 1:
        found = [path for path in found if re.split(r"[-.]", path.name)[0] == split]
    if not found:
        expected = folder / f"{split}.jsonl"
        raise SetupError(
            f"{expected} is missing: put the files of {source.hub} (jsonl, json or parquet) there, "
            "or unset data_root and LORA_GA_DATA_ROOT to use the hub"
        )
    if len({path.suffix for path in found}) > 1:
        names = ", ".join(path.name for path in found)
        raise SetupError(f"{folder} holds {split} rows in several forms ({names}): keep one")
    return found


def _read_files(files: Sequence[Path]) -> Dataset:
    import datasets

    names = [str(path) for path in files]
    try:
        return datasets.load_dataset(
            KINDS[files[0].suffix], data_files=names, split="train", cache_dir=str(cache_folder("datasets"))
        )
    except Exception as error:  # pyarrow, pandas and datasets each raise their own for a damaged file
        raise SetupError(f"cannot read {names[0]} ({_line(error)}): fetch the file again") from error


def _read_hub(source: Source) -> tuple[dict[str, Dataset], str]:
    import datasets

    try:
        loaded = datasets.load_dataset(source.hub, source.config, revision=source.revision)
        unpinned = " (as it is today: no paper names a revision)" if source.revision == "main" else ""
        return {split: loaded[split] for split in source.splits}, f"{source.hub}@{source.revision[:8]}{unpinned}"
    except Exception as error:  # the hub client raises many kinds for one cause: not reachable
        raise SetupError(
            f"cannot load {source.hub} from the hub ({_line(error)}): "
            f"set data_root or LORA_GA_DATA_ROOT to a folder with {source.folder}/{source.splits[0]}.jsonl"
        ) from error


def _line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).splitlines() or [type(cause).__name__])[0]
