"""The bench's results as Markdown: medians, and how many times what the first side, ours, takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one comparison's table; the ratios are to its first side."""
    medians: Mapping[str, Mapping[str, float]] = found["medians"]
    first = next(iter(medians.values()))
    facts = [key for key in first if key not in ("seconds", "extra_mb")]
    header = ["", "seconds", "times ours", "extra MB", "times ours", *(key.replace("_", " ") for key in facts)]
    body = []
    for side, median in medians.items():
        cells = []
        for key in ("seconds", "extra_mb"):
            ratio = median[key] / first[key] if first[key] > 0 else float("nan")
            cells += [_number(median[key]), f"{ratio:.2f}" if ratio == ratio else "-"]
        body.append([side, *cells, *(f"{median[key]:.4g}" for key in facts)])
    return header, body


def lines(name: str, found: Mapping[str, Any]) -> list[str]:
    """One comparison's section."""
    header, body = rows(found)
    repeats = f"median of {found['repeats']}" if found["repeats"] > 1 else "one measurement"
    table = [f"| {' | '.join(line)} |" for line in (header, ["---", *["---:"] * (len(header) - 1)], *body)]
    return [f"## {name}", "", f"{found['what']}; {repeats}.", "", *table, ""]


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
    known = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in order if (folder / f"{name}.json").exists()
    }
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
    ]
    return "\n".join([*head, *(line for name, found in known.items() for line in lines(name, found))])
