"""Readers of GLUE's files in a mirror folder: GLUE's own TSV layout, or the hub's parquet files.

TSV, as GLUE's download gives it: `<root>/glue/CoLA/train.tsv` or `<root>/CoLA/train.tsv` (dev.tsv, dev_matched.tsv);
texts hold unescaped quotes, so a tab and a line end are the only separators. Parquet: `<root>/cola/train-*.parquet`
or `train.parquet`, `validation*.parquet`, with the hub's column names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_ga.data.tasks import Example
from lora_ga.errors import SetupError


@dataclass(frozen=True)
class Form:
    """How one task looks: canonical label names (index = label), and `columns`, field -> TSV column name or number."""

    name: str
    folder: str
    labels: tuple[str, ...]
    columns: Mapping[str, str | int]
    label_column: str | int
    dev_file: str = "dev.tsv"
    named_labels: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The text fields, in the hub's names."""
        return tuple(self.columns)

    @property
    def header(self) -> bool:
        """Whether the TSV file opens with column names."""
        return isinstance(self.label_column, str)


# Label order: the ClassLabel order of the hub's nyu-mll/glue.
ENTAILMENT = ("entailment", "neutral", "contradiction")
FORMS: Mapping[str, Form] = {
    "mnli": Form(
        "mnli", "MNLI", ENTAILMENT, {"premise": "sentence1", "hypothesis": "sentence2"}, "gold_label",
        "dev_matched.tsv", True,
    ),
    "sst2": Form("sst2", "SST-2", ("negative", "positive"), {"sentence": "sentence"}, "label"),
    "cola": Form("cola", "CoLA", ("unacceptable", "acceptable"), {"sentence": 3}, 1),
    "qnli": Form(
        "qnli", "QNLI", ("entailment", "not_entailment"), {"question": "question", "sentence": "sentence"}, "label",
        named_labels=True,
    ),
    "mrpc": Form(
        "mrpc", "MRPC", ("not_equivalent", "equivalent"),
        {"sentence1": "#1 String", "sentence2": "#2 String"}, "Quality",
    ),
}  # fmt: skip


def mirror_folder(form: Form, root: Path) -> Path:
    """The first folder of the mirror that holds a file of the task; SetupError naming the path expected if none."""
    folders = [base / folder for base in (root / "glue", root) for folder in (form.folder, form.name)]
    for folder in folders:
        if find_file(form, folder, "dev") or find_file(form, folder, "train"):
            return folder
    expected = folders[0]
    raise SetupError(f"{expected / 'train.tsv'} is missing: put GLUE's train.tsv and {form.dev_file} in {expected}")


def find_file(form: Form, folder: Path, which: str) -> Path | None:
    """The task's train or dev file: TSV first, else a single parquet file."""
    tsv = folder / ("train.tsv" if which == "train" else form.dev_file)
    if tsv.is_file():
        return tsv
    stem = "train" if which == "train" else "validation_matched" if form.name == "mnli" else "validation"
    found = sorted([*folder.glob(f"{stem}.parquet"), *folder.glob(f"{stem}-*.parquet")])
    if len(found) > 1:
        raise SetupError(f"{folder} holds {len(found)} files {stem}*.parquet: keep one")
    return found[0] if found else None


def read_file(form: Form, path: Path) -> list[Example]:
    """Every labelled row of one file, in file order; SetupError naming file and line for a row that does not fit."""
    return _read_parquet(form, path) if path.suffix == ".parquet" else _read_tsv(form, path)


def _read_tsv(form: Form, path: Path) -> list[Example]:
    # Not csv nor splitlines: texts hold quotes and unicode line separators. utf-8-sig: MRPC opens with a BOM.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    names = lines[0].rstrip("\r").split("\t") if form.header else []
    wanted = [*form.columns.values(), form.label_column]
    absent = [column for column in wanted if isinstance(column, str) and column not in names]
    if absent:
        raise SetupError(f"{path} has no column {absent[0]!r} in its first line: is it GLUE's {form.folder} file?")
    places = [column if isinstance(column, int) else names.index(column) for column in wanted]
    width = len(names) if form.header else 4
    rows = []
    for number, line in enumerate(lines[int(form.header) :], start=1 + int(form.header)):
        if not line.strip("\r"):
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) != width:
            raise SetupError(f"{path}, line {number}: {len(cells)} columns, not {width}: fetch the file again")
        # Texts stay as they are: the hub's SST-2 keeps its trailing spaces too.
        *texts, label = (cells[place] for place in places)
        label = label.strip()
        if label == "-":  # MNLI: the annotators did not agree
            continue
        rows.append(Example(dict(zip(form.fields, texts, strict=True)), _label(form, label, f"{path}, line {number}")))
    return rows


def _label(form: Form, label: str, where: str) -> int:
    known = form.labels if form.named_labels else tuple(str(index) for index in range(len(form.labels)))
    if label not in known:
        raise SetupError(f"{where}: label {label!r} is none of {', '.join(known)}: fetch the file again")
    return known.index(label)


def _read_parquet(form: Form, path: Path) -> list[Example]:
    import pandas

    table = pandas.read_parquet(path)
    absent = [column for column in (*form.fields, "label") if column not in table.columns]
    if absent:
        raise SetupError(f"{path} has no column {absent[0]!r}: use the parquet files of the hub's glue data set")
    table = table[table["label"] >= 0]
    texts = [table[field].astype(str) for field in form.fields]
    return [
        Example(dict(zip(form.fields, row, strict=True)), int(label))
        for *row, label in zip(*texts, table["label"], strict=True)
    ]
