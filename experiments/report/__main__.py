"""Tables and figures from records: `python -m experiments.report experiment=glue [scale=local] [records=results/runs]
[baseline=results/baseline] [out=results]`. Writes <out>/tables/<experiment>-<scale>.{md,csv,tex} and
<out>/figures/<experiment>-<scale>-<task>.{png,pdf}; the same records give the same bytes. Records of the
same models scored under several protocols give the table of how much protocols and methods move instead.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.report import protocols
from experiments.report.exports import csv_text, latex
from experiments.report.figures import write_figures
from experiments.report.flags import flags
from experiments.report.grid import METHODS, TASKS, build_grid
from experiments.report.loading import NO_PLAN, Entry, Plan, read_entries, read_plan
from experiments.report.page import legend, page
from experiments.report.published import PublishedRow, read_published
from experiments.report.tables import MainTable
from lora_ga.errors import SetupError
from lora_ga.records import write_atomic

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """The keys of the command line; relative paths start at the repository."""

    experiment: str
    scale: str = "local"
    records: str = "results/runs"
    baseline: str = "results/baseline"
    out: str = "results"

    @property
    def name(self) -> str:
        return f"{self.experiment}-{self.scale}"


def parse(arguments: Sequence[str]) -> Settings:
    """Settings from key=value arguments; SetupError names what is wrong."""
    known = [field.name for field in dataclasses.fields(Settings)]
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise SetupError(f"{argument!r} is not of the form key=value; keys: {', '.join(known)}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise SetupError(
                f"unknown key {key}; {f'did you mean {near[0]}?' if near else 'keys: ' + ', '.join(known)}"
            )
        values[key] = value
    if not re.fullmatch(r"[\w.-]+", values.get("experiment", "")):
        raise SetupError("say which experiment, e.g. experiment=glue")
    if values.get("scale", "local") not in TASKS:
        raise SetupError(f"scale={values['scale']} is not one of {', '.join(TASKS)}")
    return Settings(**values)


def _beside(settings: Settings, plan: Plan, entries: Sequence[Entry]) -> tuple[MainTable, dict[str, str]]:
    """The main table and the meaning of the published sources."""
    published: list[PublishedRow] = []
    sources: dict[str, str] = {}
    if settings.scale == "paper":
        published, sources = read_published(ROOT / "results" / "published.yaml", settings.experiment)
    grid = build_grid(
        entries,
        plan,
        settings.scale,
        methods=[row.method for row in published],
        columns=[column for row in published for column in row.cells],
    )
    baseline = None
    if settings.scale == "local":
        known, _ = read_entries(ROOT / settings.baseline / settings.name, settings.experiment, settings.scale)
        baseline = build_grid(known, NO_PLAN, settings.scale)
    order = {method: place for place, method in enumerate(METHODS)}
    published.sort(key=lambda row: order[row.method])
    return MainTable(grid, baseline, published), sources


def report(settings: Settings) -> Path:
    """Write everything; returns the Markdown page."""
    plan = read_plan(ROOT / "conf" / "experiment" / f"{settings.experiment}.yaml", settings.scale)
    folder = ROOT / settings.records / settings.name
    entries, skipped = read_entries(folder, settings.experiment, settings.scale)
    if not entries:
        log.warning("no records in %s: every cell will say so", folder)
    if not entries and not plan.tasks:
        raise SetupError(f"no experiment={settings.experiment} at scale={settings.scale}, and no records in {folder}")
    title = f"{settings.experiment}, {settings.scale} scale"
    if plan.protocols or protocols.rescored(entries):
        grids = protocols.by_protocol(entries, plan, settings.scale)
        return _write(
            settings,
            csv=protocols.csv_text(grids),
            tex=protocols.latex(grids, title, settings.name),
            md=protocols.page(title, grids, plan.notes, skipped),
        )
    table, sources = _beside(settings, plan, entries)
    notes = [*plan.notes, *flags(table.grid, skipped)]
    pictures = write_figures(table.grid, ROOT / settings.out / "figures", settings.name)
    links = {task: f"../figures/{path.name}" for task, path in pictures.items()}
    return _write(
        settings,
        csv=csv_text(table),
        tex=latex(table, title, settings.name, [*legend(table), *notes]),
        md=page(title, table, notes, sources, links),
    )


def _write(settings: Settings, *, csv: str, tex: str, md: str) -> Path:
    """The table's three files, the page last."""
    tables = ROOT / settings.out / "tables"
    write_atomic(tables / f"{settings.name}.csv", csv)
    write_atomic(tables / f"{settings.name}.tex", tex)
    return write_atomic(tables / f"{settings.name}.md", md)


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 2 with one line if a setting is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it reports every glyph of a PDF
    try:
        path = report(parse(arguments))
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
