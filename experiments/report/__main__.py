"""Tables and figures from records: `python -m experiments.report [experiment=glue] [scale=local] [records=results/runs]
[baseline=results/baseline] [out=results]`; without experiment, of all that has records, and the papers' tables; without
scale too, all of it as <out>/report.html. Writes <out>/tables/<experiment>-<scale>.{md,csv,tex}, -analysis.{csv,tex},
<out>/figures/<experiment>-<scale>-*; the same records give the same bytes. Records of the same models scored under
several protocols give the table of how much protocols and methods move instead. Where records and baseline are one
folder there is no difference to show, so the committed records give the committed pages.
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

from experiments.report import papers_page, protocols, sections
from experiments.report.analysis import SearchRecords, analyse
from experiments.report.drawing import save
from experiments.report.exports import csv_text, latex
from experiments.report.flags import flags
from experiments.report.grid import METHODS, TASKS, build_grid
from experiments.report.html import html
from experiments.report.loading import NO_PLAN, Entry, Plan, read_entries, read_plan
from experiments.report.page import legend, page
from experiments.report.papers import read_library
from experiments.report.published import PublishedRow, read_published, read_tables
from experiments.report.sections import Page
from experiments.report.tables import MainTable
from lora_ga.errors import SetupError
from lora_ga.records import write_atomic

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results" / "published.yaml"


@dataclass(frozen=True)
class Settings:
    """The keys of the command line; relative paths start at the repository; no experiment or scale: all."""

    experiment: str = ""
    scale: str = ""
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
    if not re.fullmatch(r"[\w.-]+", values.get("experiment", "glue")):
        raise SetupError("say which experiment, e.g. experiment=glue")
    if values.get("scale", "local") not in TASKS:
        raise SetupError(f"scale={values['scale']} is not one of {', '.join(TASKS)}")
    if "experiment" in values:
        values.setdefault("scale", "local")
    return Settings(**values)


def _plan(experiment: str, scale: str) -> Plan:
    return read_plan(ROOT / "conf" / "experiment" / f"{experiment}.yaml", scale)


def _beside(settings: Settings, plan: Plan, entries: Sequence[Entry]) -> tuple[MainTable, dict[str, str]]:
    """The main table and the meaning of the published sources."""
    published: list[PublishedRow] = []
    sources: dict[str, str] = {}
    if settings.scale == "paper":
        published, sources = read_published(PUBLISHED, settings.experiment)
    grid = build_grid(
        entries,
        plan,
        settings.scale,
        methods=[row.method for row in published],
        columns=[column for row in published for column in row.cells],
    )
    baseline = None
    if settings.scale == "local":
        folder = ROOT / settings.baseline / settings.name
        itself = (ROOT / settings.records).resolve() == (ROOT / settings.baseline).resolve()
        known = [] if itself else read_entries(folder, settings.experiment, settings.scale)[0]
        baseline = build_grid(known, NO_PLAN, settings.scale)
    order = {method: place for place, method in enumerate(METHODS)}
    published.sort(key=lambda row: order[row.method])
    return MainTable(grid, baseline, published), sources


def _search(settings: Settings, plan: Plan, entries: Sequence[Entry]) -> SearchRecords | None:
    """The search that the plan names, the user's own before the committed one; or the table itself, if it is one."""
    if plan.search is None:
        tried = {(entry.record.method, entry.record.learning_rate) for entry in entries}
        several = len(tried) > len({method for method, _ in tried})
        return SearchRecords(settings.experiment, entries, (), plan) if several else None
    for folder in (settings.records, settings.baseline):
        path = ROOT / folder / f"{plan.search}-{settings.scale}"
        known, skipped = read_entries(path, plan.search, settings.scale)
        if known:
            return SearchRecords(plan.search, known, skipped, _plan(plan.search, settings.scale))
    return None


def report(settings: Settings) -> tuple[Path, Page]:
    """Write everything of one experiment; returns its Markdown page, and what that was made of."""
    plan = _plan(settings.experiment, settings.scale)
    folder = ROOT / settings.records / settings.name
    entries, skipped = read_entries(folder, settings.experiment, settings.scale)
    if not entries:
        log.warning("no records in %s: every cell will say so", folder)
    if not entries and not plan.tasks:
        raise SetupError(f"no experiment={settings.experiment} at scale={settings.scale}, and no records in {folder}")
    title = f"{settings.experiment}, {settings.scale} scale"
    if plan.protocols or protocols.rescored(entries):
        grids = protocols.by_protocol(entries, plan, settings.scale)
        shown = protocols.page(settings.name, title, grids, plan.notes, skipped)
        return _write_page(settings, shown, protocols.csv_text(grids), protocols.latex(grids, title, settings.name))
    table, sources = _beside(settings, plan, entries)
    known = analyse(table.grid, settings.name, _search(settings, plan, entries))
    notes = [*known.notes, *plan.notes, *flags(table.grid, skipped)]
    save(known.figures, ROOT / settings.out / "figures")
    below = {"csv": sections.csv_text(known.sections), "tex": sections.latex(known.sections, title, settings.name)}
    _write(settings, f"{settings.name}-analysis", **below)
    shown = page(settings.name, title, table, notes, sources, known.sections)
    tex = latex(table, title, settings.name, [*legend(table), *notes])
    return _write_page(settings, shown, csv_text(table), tex)


def report_all(settings: Settings) -> list[Path]:
    """Write every experiment with a folder of records, the papers' tables unless only local scale is asked for, and,
    where no scale is asked for, the whole as report.html; returns the Markdown pages and that."""
    written = []
    scales = [settings.scale] if settings.scale else list(TASKS)
    for folder in sorted(path.name for path in (ROOT / settings.records).glob("*") if path.is_dir()):
        experiment, _, scale = folder.rpartition("-")
        if experiment and scale in scales:
            written.append(report(dataclasses.replace(settings, experiment=experiment, scale=scale)))
    if "paper" in scales:
        library = read_library(ROOT / settings.records, *read_tables(PUBLISHED), "paper")
        tables = papers_page.csv_text(library), papers_page.latex(library)
        written.append(_write_page(settings, papers_page.page(library), *tables))
    paths, out = [path for path, _ in written], ROOT / settings.out
    if not settings.scale:
        paths.append(write_atomic(out / "report.html", html([shown for _, shown in written], out)))
    return paths


def _write(settings: Settings, name: str, **texts: str) -> Path:
    """A table's files by suffix; returns the last."""
    paths = [write_atomic(ROOT / settings.out / "tables" / f"{name}.{suffix}", text) for suffix, text in texts.items()]
    return paths[-1]


def _write_page(settings: Settings, shown: Page, csv: str, tex: str) -> tuple[Path, Page]:
    return _write(settings, shown.name, csv=csv, tex=tex, md=shown.markdown()), shown


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 2 with one line if a setting is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it reports every glyph of a PDF
    try:
        settings = parse(arguments)
        pages = [report(settings)[0]] if settings.experiment else report_all(settings)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, pages)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
