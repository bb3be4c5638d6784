"""GLUE's MNLI, SST-2, CoLA, QNLI and MRPC, from the hub or from a mirror folder.

Source: Wang et al. 2019; hub data set nyu-mll/glue at a pinned revision. A mirror (`data_root`, else
`$LORA_GA_DATA_ROOT`) holds GLUE's own TSV files or the hub's parquet files; glue_files.py reads both.
GLUE hides its test labels, so `test` here is GLUE's validation file (MNLI: matched), as in the papers.
Differs in: validation rows for choosing learning rates are cut from train, only if sizes asks for them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_ga.data.glue_files import FORMS, Form, find_file, mirror_folder, read_file
from lora_ga.data.tasks import SPLITS, Example, TaskData
from lora_ga.errors import SetupError

logger = logging.getLogger(__name__)

HUB_NAME = "nyu-mll/glue"
HUB_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
VALIDATION_SHARE, VALIDATION_MOST = 0.05, 1000
WITHOUT_TRAIN = {"train": 0.6, "validation": 0.2, "test": 0.2}


@dataclass(frozen=True)
class Files:
    """GLUE's two labelled files in file order, and where they were read; `train` is None if the mirror lacks it."""

    train: list[Example] | None
    dev: list[Example]
    origin: str


def load_glue(name: str, *, sizes: Mapping[str, int | None], data_root: str | None = None) -> TaskData:
    """Load one of GLUE's five.

    Args: sizes, the most rows per split (None = all; the first ones in file order, as the authors' shuffle has no
    effect); validation 0 leaves the whole train file to train; data_root, the mirror folder.
    Returns: TaskData. Errors: SetupError naming the file expected, or the setting that avoids the hub.
    """
    if name not in FORMS:
        raise SetupError(f"unknown GLUE task {name!r}: use one of {', '.join(FORMS)}")
    root = data_root or os.environ.get("LORA_GA_DATA_ROOT")
    files = _read_mirror(FORMS[name], Path(root)) if root else _read_hub(FORMS[name])
    dev_name = "validation_matched" if name == "mnli" else "validation"
    notes = [f"test is GLUE's {dev_name} file: the labels of GLUE's own test file are hidden"]
    if files.train is None:
        splits = _cut(files.dev, WITHOUT_TRAIN)
        notes = [f"the mirror has no train file for {name}: GLUE's {dev_name} file was cut 60/20/20 by hash"]
        logger.warning("%s", notes[0])
    else:
        splits = {"train": files.train, "validation": [], "test": files.dev}
        if sizes.get("validation", 0) != 0:
            splits["train"], splits["validation"] = _hold_out(files.train)
            notes.append(f"validation is {len(splits['validation'])} rows of GLUE's train file, chosen by hash")
        shared = len({_key(row) for row in files.train} & {_key(row) for row in files.dev})
        if shared:
            notes.append(f"GLUE's own train and {dev_name} files share {shared} texts; kept, as in the papers")
    limits = {"train": sizes.get("train"), "validation": sizes.get("validation", 0), "test": sizes.get("test")}
    rows = {split: tuple(splits[split][: limits[split]]) for split in SPLITS}
    return TaskData(name, FORMS[name].labels, rows, (*notes, f"read from {files.origin}"))


def _read_mirror(form: Form, root: Path) -> Files:
    folder = mirror_folder(form, root)
    dev = find_file(form, folder, "dev")
    if dev is None:
        raise SetupError(
            f"{folder / form.dev_file} is missing: put GLUE's file there, or unset data_root to use the hub"
        )
    train = find_file(form, folder, "train")
    return Files(read_file(form, train) if train else None, read_file(form, dev), "a mirror folder")


def _read_hub(form: Form) -> Files:
    import datasets

    try:
        loaded = datasets.load_dataset(HUB_NAME, form.name, revision=HUB_REVISION)
    except Exception as error:  # the hub client raises many kinds for one cause: not reachable
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SetupError(
            f"cannot load {HUB_NAME} {form.name} from the hub ({reason}): "
            "set data_root or LORA_GA_DATA_ROOT to a folder with GLUE's files"
        ) from error

    def rows(split: str) -> list[Example]:
        return [Example({f: str(row[f]) for f in form.fields}, int(row["label"])) for row in loaded[split]]

    dev = "validation_matched" if form.name == "mnli" else "validation"
    return Files(rows("train"), rows(dev), f"{HUB_NAME}@{HUB_REVISION[:8]}")


def _key(row: Example) -> str:
    return " | ".join(" ".join(text.lower().split()) for text in row.fields.values())


def _digest(row: Example) -> bytes:
    """Where a row falls: by its first text alone, so that a question or premise never sits in two splits."""
    return hashlib.sha256(_key(row).split(" | ")[0].encode()).digest()


def _hold_out(rows: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(train, validation): the rows of the smallest digests, independent of row order and of repeated texts."""
    digests = [_digest(row) for row in rows]
    most = min(VALIDATION_MOST, int(VALIDATION_SHARE * len(rows)))
    ordered = sorted(digests)
    # Rows of one digest go together, so the cut may fall a little short of `most`, never over it.
    limit = ordered[most] if most < len(ordered) else b"\xff" * 33
    kept = [row for row, digest in zip(rows, digests, strict=True) if digest >= limit]
    held = [row for row, digest in zip(rows, digests, strict=True) if digest < limit]
    return kept, held


def _cut(rows: Sequence[Example], shares: Mapping[str, float]) -> dict[str, list[Example]]:
    """Split rows by where their digest falls between 0 and 1, keeping file order."""
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for row in rows:
        place = int.from_bytes(_digest(row)[:8], "big") / 2**64
        split = next(s for i, s in enumerate(SPLITS) if place < sum(shares[t] for t in SPLITS[: i + 1]) or i == 2)
        splits[split].append(row)
    return splits
