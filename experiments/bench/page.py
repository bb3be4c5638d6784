"""The bench's results as Markdown: medians, and how many times what the first side, ours, takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# (one of our sides, what it stands beside): in the type that ours usually computes in, and in the peer's own
STARTS = (
    ("incremental", "plain, float32"),
    ("incremental", "PEFT, float32"),
    ("incremental, float32", "plain, float32"),
    ("incremental, float32", "PEFT, float32"),
    ("incremental", "plain"),
    ("incremental", "PEFT"),
)
LIMIT = (("incremental", "its passes alone"), ("incremental", "their matrix products alone"))
LOOPS = (
    ("ours", "stock, fixed length, float32"),
    ("ours", "stock, dynamic, float32"),
    ("ours, float32", "stock, dynamic, float32"),
    ("ours", "stock, dynamic, bf16"),
    ("ours, compiled", "ours"),
)
HEADLINES: Mapping[str, Sequence[tuple[str, str]]] = {
    "start-smollm2": STARTS,
    "start-t5-base": STARTS,
    "start-llama-1b": (("incremental", "plain"),),
    "limit-smollm2": LIMIT,
    "limit-t5-base": LIMIT,
    "lora_pro-full": (("ours", "per layer, pinv and eig"), ("ours", "two moments read and written")),
    "lora_pro-efficient": (("ours", "fused AdamW and the small matrices"),),
    "preconditioned": (("ours", "PEFT's Riemannian"),),
    "train-movies": LOOPS,
    "train-word_problems": LOOPS,
    "answers": (("batches of 24", "one by one"),),
}


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one comparison's table; the ratios are to its first side."""
    medians: Mapping[str, Mapping[str, float]] = found["medians"]
    first = next(iter(medians.values()))
    facts = [key for key in first if key not in ("seconds", "extra_mb")]
    of_quality = "least_share" in first  # such a comparison is not one of time, and may be run beside other work
    costs = () if of_quality else ("seconds", "extra_mb")
    names = [] if of_quality else ["seconds", "times ours", "extra MB", "times ours"]
    header = ["", *names, *(key.replace("_", " ") for key in facts)]
    body = []
    for side, median in medians.items():
        cells = []
        for key in costs:
            ratio = median[key] / first[key] if first[key] > 0 else float("nan")
            cells += [_number(median[key]), f"{ratio:.2f}" if ratio == ratio else "-"]
        body.append([side, *cells, *(f"{median[key]:.4g}" for key in facts)])
    return header, body


def curve(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a comparison whose sides are two ways, in turn, each at one setting after another."""
    medians: Mapping[str, Mapping[str, float]] = found["medians"]
    names = list(medians)
    ways = [name.rpartition(" ")[0] for name in names[:2]]
    header = ["", *(f"{way}, {unit}" for unit in ("seconds", "extra MB") for way in [*ways, "ratio"])]
    body = []
    for ours, other in zip(names[::2], names[1::2], strict=True):
        cells = []
        for key in ("seconds", "extra_mb"):
            mine, its = medians[ours][key], medians[other][key]
            cells += [_number(mine), _number(its), f"{its / mine:.2f}"]
        body.append([ours.rpartition(" ")[2], *cells])
    return header, body


def lines(name: str, found: Mapping[str, Any]) -> list[str]:
    """One comparison's section."""
    header, body = curve(found) if name.startswith("scaling-") else rows(found)
    repeats = f"median of {found['repeats']}" if found["repeats"] > 1 else "one measurement"
    table = [f"| {' | '.join(line)} |" for line in (header, ["---", *["---:"] * (len(header) - 1)], *body)]
    return [f"## {name}", "", f"{found['what']}; {repeats}.", "", *table, ""]


def _pace(median: Mapping[str, float]) -> float:
    """Seconds, or where the side tells its tokens a second, seconds a token."""
    return 1 / median["tokens_per_second"] if "tokens_per_second" in median else median["seconds"]


def summary(known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How many times our time, and our extra memory, the peers take; what has not been run is left out."""
    table = ["| what | ours | beside | its time / ours | its extra memory / ours |"]
    table.append("| :--- | :--- | :--- | ---: | ---: |")
    for name, sides in HEADLINES.items():
        medians = known[name]["medians"] if name in known else {}
        for mine, side in (pair for pair in sides if medians.keys() >= set(pair)):
            time = f"{_pace(medians[side]) / _pace(medians[mine]):.2f}"
            memory = f"{medians[side]['extra_mb'] / medians[mine]['extra_mb']:.2f}"
            table.append(f"| {known[name]['what']} | {mine} | {side} | {time} | {memory} |")
    return table


def read(folder: Path, order: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The comparisons that have been run, by name."""
    paths = {name: folder / f"{name}.json" for name in order}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def machine(found: Mapping[str, Any]) -> str:
    """One line on where and with what it was measured."""
    environment = found["environment"]
    packages = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "transformers", "peft"))
    commit = (environment["git_commit"] or "none")[:10] + (
        ", with uncommitted changes" if environment["git_dirty"] else ""
    )
    return f"{found['processor']} ({environment['cpu']}), {found['threads']} threads; {packages}; commit {commit}"


def page(folder: Path, order: Sequence[str]) -> str:
    """All comparisons that have been run."""
    known = read(folder, order)
    machines: dict[str, list[str]] = {}
    for name, found in known.items():
        machines.setdefault(machine(found), []).append(name)
    head = [
        "# Speed and memory beside others",
        "",
        "Written by `make bench`. Every measurement is a process of its own, and the sides of a comparison take turns;",
        "extra MB is how far the process's peak rose above where the work began; the first line is ours.",
        "",
        *(f"- {where}: {', '.join(names)}" for where, names in machines.items()),
        "",
        *summary(known),
        "",
    ]
    return "\n".join([*head, *(line for name, found in known.items() for line in lines(name, found))])
