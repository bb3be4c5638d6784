"""Proves that the README does not rot: links, commands and make targets exist, its numbers are the committed ones."""

import re
import shlex
from pathlib import Path

import pytest

from experiments.bench.compare import comparisons
from experiments.bench.page import page as bench_page
from experiments.bench.page import read, summary
from experiments.config import load_config
from experiments.launch import run_overrides
from experiments.plan import expand
from slurm.settings import read_settings, split
from slurm.submit import planned

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (?:\w+=\S+ )*\.venv/bin/python -m ((?:experiments|slurm)\.\w+)([^#\n]*)", README, re.M)


def test_links_name_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(("module", "arguments"), COMMANDS, ids=[arguments.strip() for _, arguments in COMMANDS])
def test_commands_compose(module: str, arguments: str) -> None:
    overrides = shlex.split(arguments)
    if module == "experiments.run":
        assert load_config(overrides).run_id
    elif module == "experiments.launch":
        assert load_config(run_overrides(overrides)).launcher.kind != "none"
    elif module == "slurm.submit":
        ours, runs = split(overrides)
        assert read_settings(ours) and planned(runs)
    elif module in ("slurm.status", "experiments.report"):
        assert all(override.partition("=")[0] in ("experiment", "scale") for override in overrides)
    else:
        assert module in ("experiments.plan", "experiments.sweep") and expand(overrides)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert "reproduce-glue" in targets and "test" in targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []


@pytest.mark.parametrize(("experiment", "methods"), [("glue", 5), ("math", 6)])
def test_the_local_table_is_the_committed_one(experiment: str, methods: int) -> None:
    page = (ROOT / f"results/baseline/{experiment}-local/tables/{experiment}-local.md").read_text()
    rows = [line for line in page.splitlines() if "| ours |" in line]
    assert len(rows) == methods
    assert [row for row in rows if row not in README] == []


def written(folder: Path) -> dict[str, bytes]:
    """Tables and pictures by name; not the PDFs, whose compression is the machine's."""
    paths = [*(folder / "tables").iterdir(), *folder.glob("figures/*.png")]
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.slow
def test_the_committed_records_give_the_committed_tables_and_pictures(committed_report: Path) -> None:
    """The README's among them; run `make baseline-tables` where this fails after records were added."""
    committed: dict[str, bytes] = {}
    for folder in (ROOT / "results/baseline").iterdir():
        committed |= written(folder)
    made = written(committed_report)
    assert len(made) > 40 and sorted(committed) == sorted(made)
    assert [name for name in made if made[name] != committed[name]] == []
    shown = re.findall(r"!\[[^]]*\]\((\S+\.png)\)", README)
    assert len(shown) == 2 and all(made[Path(path).name] == (ROOT / path).read_bytes() for path in shown)


def lines_of(experiment: str, heading: str) -> list[list[str]]:
    """The cells of a committed table, header first."""
    page = (ROOT / f"results/baseline/{experiment}-local/tables/{experiment}-local.md").read_text()
    table = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ") and "---" not in line]


@pytest.mark.parametrize("experiment", ["glue_lr", "math_lr"])
def test_the_rates_are_the_committed_ones(experiment: str) -> None:
    """All but the task's column and the count of seeds."""
    header, *lines = lines_of(experiment, "Learning-rate sensitivity")
    shown = [" | ".join([line[0], *line[2:]]).replace(" (n=1)", "") for line in lines]
    assert len(shown) >= 5 and [line for line in shown if f"| {line} |" not in README] == []
    assert f"| {' | '.join(header[2:])} |" in README


def test_the_costs_are_the_committed_ones() -> None:
    """Of the second machine, where nothing else ran; all but the last two columns."""
    header, *lines = lines_of("glue", "Cost, mean over finished runs")
    alone = [" | ".join(line[:6]).replace(" [2]", "") for line in [header, *lines] if "[1]" not in line[0]]
    assert len(alone) == 6 and [line for line in alone if f"| {line} |" not in README] == []


def test_the_table_of_ratios_is_that_of_the_committed_measurements():
    known = read(ROOT / "results" / "bench", list(comparisons()))
    assert known and "\n".join(summary(known)) in README
    assert bench_page(ROOT / "results" / "bench", list(comparisons())) == (ROOT / "results/bench/README.md").read_text()
