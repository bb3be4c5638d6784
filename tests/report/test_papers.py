"""Proves that known runs give known verdicts in the papers' tables; none rests on memory or on half a run."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from experiments.report.__main__ import PUBLISHED, main
from experiments.report.papers import NOT_COMPARABLE, NOT_RUN, OUTSIDE, WITHIN, Library, PaperCell, cells, read_library
from experiments.report.published import PaperRow, PaperTable, read_tables

PUBLISHED_TABLES = read_tables(PUBLISHED)
TABLES = {table.key: table for table in PUBLISHED_TABLES[0]}
SST2 = [0.9393, 0.9404, 0.9415]  # LoRA-GA prints 94.04 ± 0.11 for LoRA


@pytest.fixture
def run(bench: Any, record: Any) -> Any:
    """Adds runs of one method and task at paper scale, one a value."""

    def add(task: str, method: str, values: list[float], experiment: str = "glue", **changes: Any) -> None:
        settings = changes.pop("settings", {})
        protocol, split = changes.pop("protocol", "lora_ga"), changes.pop("split", "test")
        rate, metric = changes.pop("rate", 1e-4), changes.pop("metric", "accuracy")
        for seed, value in enumerate(values):
            made = record(task, method, seed, value, experiment=experiment, scale="paper", protocol=protocol, **changes)
            made.learning_rate = rate
            made.run_id = f"{protocol}{split}{rate:g}{changes.get('model')}{settings}".replace("/", "")
            made.config = {
                "task": {"name": task, "metric": metric},
                "method": {"name": method, **({} if method == "full_ft" else {"r": 8})},
                "protocol": {"name": protocol},
                **settings,
            }
            made.data["scored"] = {**made.data["scored"], "split": split}
            made.metrics = {metric: {"value": value, "n": 400}, "eval_loss": {"value": 1 - value, "n": 400}}
            bench.add(made)

    return add


def library(bench: Any) -> Library:
    return read_library(bench.root / "runs", *PUBLISHED_TABLES, "paper")


def cell(bench: Any, table: str, name: str, heading: str) -> PaperCell:
    (row,) = [row for row in TABLES[table].rows if row.name == name]
    (found,) = [known for known in cells(library(bench), TABLES[table], row) if known.heading == heading]
    return found


def test_without_records_everything_with_a_task_is_not_run(bench: Any) -> None:
    empty = library(bench)
    for table in empty.shown:
        for row in table.rows:
            for known in cells(empty, table, row):
                possible = table.columns[known.heading] is not None and row.method is not None
                assert known.verdict.kind == (NOT_RUN if possible else NOT_COMPARABLE)


@pytest.mark.parametrize(("shift", "kind"), [(0.0, WITHIN), (0.02, OUTSIDE), (-0.02, OUTSIDE)])
def test_verdict_of_known_runs(bench: Any, run: Any, shift: float, kind: str) -> None:
    run("sst2", "lora", [value + shift for value in SST2], model="t5_base")
    known = cell(bench, "lora_ga_glue_t5base", "LoRA", "SST-2")
    assert known.verdict.kind == kind
    assert known.verdict.difference is not None and known.own.summary is not None
    assert known.verdict.difference.value == pytest.approx(100 * shift, abs=1e-6)
    assert known.own.summary.n == 3
    assert cell(bench, "lora_ga_glue_t5base", "LoRA", "CoLA").verdict.kind == NOT_RUN


GREY = [
    (table, row, heading)
    for table in TABLES.values()
    if table.protocol
    for row in table.rows
    for heading, column in table.columns.items()
    if column and row.method and heading in row.cells and row.cells[heading].from_memory and column.task != "average"
]


@pytest.mark.parametrize(
    ("table", "row", "heading"), GREY, ids=[f"{table.key}-{row.name}-{heading}" for table, row, heading in GREY]
)
def test_grey_cells_never_give_a_verdict(bench: Any, run: Any, table: PaperTable, row: PaperRow, heading: str) -> None:
    """Even where our runs hit the remembered number exactly."""
    column, mean = table.columns[heading], row.cells[heading].mean
    assert column is not None
    value = (mean or 0.0) / (10 if column.metric.startswith("mt_bench") else 100)
    experiment = {"wizardlm": "chat", "metamath": "math", "code_feedback": "code"}.get(column.task, "glue")
    method = {"r": row.rank} if row.method != "full_ft" else {}
    run(
        column.task, row.method or "", [value, value + 0.001], experiment, protocol=table.protocol,
        model=table.models[0], metric=column.metric, settings={"method": method},
    )  # fmt: skip
    known = cell(bench, table.key, row.name, heading)
    assert known.own.summary is not None
    assert (known.verdict.kind, known.verdict.difference) == (NOT_COMPARABLE, None)


@pytest.mark.parametrize(
    ("values", "settings", "why"),
    [
        (SST2[:1], {}, "one seed"),
        (SST2, {"eval": {"limit": 30}}, "not all rows scored"),
        (SST2, {"train": {"max_steps": 4}}, "training cut short"),
    ],
)
def test_half_a_run_is_no_comparison(bench: Any, run: Any, values: list[float], settings: dict, why: str) -> None:
    run("sst2", "lora", values, model="t5_base", settings=settings)
    verdict = cell(bench, "lora_ga_glue_t5base", "LoRA", "SST-2").verdict
    assert (verdict.kind, verdict.why) == (NOT_COMPARABLE, why)


def test_other_models_protocols_ranks_and_validation_rows_do_not_stand_in(bench: Any, run: Any) -> None:
    run("sst2", "lora", SST2, model="t5_small")
    run("sst2", "lora", SST2, model="t5_base", protocol="common")
    run("sst2", "lora", SST2, model="t5_base", settings={"method": {"r": 32}})
    run("sst2", "lora", SST2, model="t5_base", split="validation")
    assert cell(bench, "lora_ga_glue_t5base", "LoRA", "SST-2").verdict.kind == NOT_RUN


def test_a_seed_twice_is_no_number(bench: Any, run: Any) -> None:
    run("sst2", "lora", SST2, model="t5_base")
    run("sst2", "lora", SST2, model="t5_base", rate=2e-4)
    verdict = cell(bench, "lora_ga_glue_t5base", "LoRA", "SST-2").verdict
    assert (verdict.kind, verdict.why) == (NOT_COMPARABLE, "a seed of sst2 more than once")


def test_the_average_needs_every_task(bench: Any, run: Any) -> None:
    run("sst2", "lora", SST2, model="t5_base")
    assert "not run" in cell(bench, "lora_ga_glue_t5base", "LoRA", "avg").verdict.why
    for task, mean in (("mnli", 0.853), ("cola", 0.6935), ("qnli", 0.9296), ("mrpc", 0.6838)):
        run(task, "lora", [mean - 0.001, mean, mean + 0.001], model="t5_base")
    known = cell(bench, "lora_ga_glue_t5base", "LoRA", "avg")
    assert known.own.summary is not None and known.own.summary.mean == pytest.approx(82.006, abs=0.01)
    assert known.verdict.kind == WITHIN  # of 82.08, whose own columns average 82.01
    assert cell(bench, "lora_ga_ablation", "LoRA", "GLUE avg").verdict.kind == WITHIN


def test_tuned_is_the_rate_that_validation_rows_chose_though_another_is_better_on_test_rows(
    bench: Any, run: Any
) -> None:
    common = {"experiment": "glue_tuned", "protocol": "common", "model": "t5_base"}
    run("sst2", "lora", [0.93, 0.94, 0.95], rate=1e-4, **common)
    known = cell(bench, "lora_ga_glue_t5base", "LoRA", "SST-2")
    assert (known.tuned.summary, known.tuned.why) == (None, "no search on validation rows")
    run("sst2", "lora", [0.90], rate=1e-4, split="validation", **common)
    run("sst2", "lora", [0.91], rate=5e-4, split="validation", **common)
    assert cell(bench, "lora_ga_glue_t5base", "LoRA", "SST-2").tuned.why == "not run at the chosen 5e-4"
    run("sst2", "lora", [0.91, 0.92, 0.93], rate=5e-4, **common)
    known = cell(bench, "lora_ga_glue_t5base", "LoRA", "SST-2")
    assert known.tuned.summary is not None and known.tuned.summary.mean == pytest.approx(92.0)
    assert known.verdict.kind == NOT_RUN  # a verdict is of the paper's own protocol


def test_flags_and_the_search_are_told_under_the_table(bench: Any, run: Any) -> None:
    """A run at guessing level, one that diverged, a dirty tree, and how the tuned rate was chosen."""
    dirty = {"git_commit": "b" * 40, "git_dirty": True, "cpu": "AVX2", "cpu_count": 64, "torch_threads": 64}
    run("sst2", "lora", [0.50, 0.94], model="t5_base")
    run("cola", "lora", [0.70], model="t5_base", status="diverged", environment=dirty)
    common = {"experiment": "glue_tuned", "protocol": "common", "model": "t5_base", "split": "validation"}
    run("sst2", "lora", [0.90], rate=1e-4, **common)
    run("sst2", "lora", [0.91], rate=5e-4, **common)
    page = (written(bench) / "papers.md").read_text(encoding="utf-8")
    notes = page.split("## LoRA-GA, table 1\n", 1)[1].split("\n## ", 1)[0]
    assert "Random level" in notes and "lora: sst2 (1 of 2 runs)" in notes
    assert "1 run diverged, in no mean: lora: cola seed 0." in notes
    assert "Dirty tree: 1 of 3 runs" in notes and "Mixed hardware" in notes
    assert "(experiment=glue_tuned), seeds a rate: 1; one grid for every method: 1e-4, 5e-4; runs a method: 2." in notes
    assert "Chosen: lora 5e-4." in notes
    assert cell(bench, "lora_ga_glue_t5base", "LoRA", "CoLA").verdict.why == "cola: diverged"


def test_untrusted_judge_is_no_comparison(bench: Any, run: Any) -> None:
    judge = {"eval": {"judge": {"model": "small", "trusted": False}}}
    run("wizardlm", "lora", [5.6, 5.61, 5.62], "chat", model="llama2_7b", metric="mt_bench/first_turn", settings=judge)
    verdict = cell(bench, "lora_ga_llama2_7b", "LoRA", "MT-Bench").verdict
    assert (verdict.kind, verdict.why) == (NOT_COMPARABLE, "judge not trusted")


def written(bench: Any, out: str = "out") -> Path:
    folders = {"records": "runs", "baseline": "none", "out": out}
    arguments = [f"{key}={bench.root / name}" for key, name in folders.items()]
    assert main(["scale=paper", *arguments]) == 0
    return bench.root / out / "tables"


def lines(page: str, title: str) -> list[list[str]]:
    part = page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in part.splitlines() if line.startswith("| ")]
    return [[text.strip() for text in line.strip("|").split("|")] for line in rows]


def test_page_csv_and_latex(bench: Any, run: Any) -> None:
    run("sst2", "lora", SST2, model="t5_base")
    folder = written(bench)
    page = (folder / "papers.md").read_text(encoding="utf-8")
    glue = lines(page, "LoRA-GA, table 1")
    assert glue[0] == ["method", "number", "MNLI", "SST-2", "CoLA", "QNLI", "MRPC", "avg"]
    assert [row[0] for row in glue[2::4]] == [row.name for row in TABLES["lora_ga_glue_t5base"].rows]
    assert [row[3] for row in glue[6:10]] == [
        "94.04 ± 0.11", "94.04 ± 0.11 (n=3)", "not run", "+0.00 [-0.25, +0.25]: within interval",
    ]  # fmt: skip
    titles = re.findall(r"^## (.*)$", page, re.M)
    assert titles[:-1] == [table.title for table in TABLES.values() if table.protocol]
    pro = lines(page, "LoRA-Pro, table 1")
    assert pro[2][2] == r"$\color{gray}{86.33 \pm 0.00}$†"
    assert r"59.26 $\color{gray}{\pm 0.99}$†" in page
    assert "1 of 1 verdicts within interval" in page
    (unlike,) = [line for line in page.splitlines() if line.startswith("| lora | sst2 accuracy |")]
    assert "93.76 ± 0.05 (AltLoRA, table 4 (re-run)) | 94.04 ± 0.11 (n=3) under lora_ga |" in unlike
    with (folder / "papers.csv").open(encoding="utf-8") as handle:
        (row,) = [row for row in csv.DictReader(handle) if row["verdict"] == WITHIN]
    assert (row["table"], row["own_n"], len(row["records"].split())) == ("lora_ga_glue_t5base", "3", 3)
    tex = (folder / "papers.tex").read_text(encoding="utf-8")
    assert tex.isascii() and r"\textcolor{gray}{86.33 $\pm$ 0.00}$^\dagger$" in tex
    assert tex.count(r"\begin{table}") == len([table for table in TABLES.values() if table.protocol])


def test_a_second_run_gives_the_same_bytes_and_bad_records_are_named(bench: Any, run: Any) -> None:
    run("sst2", "lora", SST2, model="t5_base")
    (bench.root / "runs" / "glue-paper" / "half.json").write_text('{"schema_version": 1, "run')
    first, second = written(bench, "one"), written(bench, "two")
    names = sorted(path.name for path in first.iterdir())
    assert {"papers.md", "papers.csv", "papers.tex", "glue-paper.md"} <= set(names)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert "glue-paper/half.json" in (first / "papers.md").read_text(encoding="utf-8")


def test_local_pages_have_no_papers(bench: Any, record: Any) -> None:
    bench.add(record("movies", "lora", 0, 0.8))
    assert main(["scale=local", f"records={bench.root / 'runs'}", "baseline=none", f"out={bench.root / 'out'}"]) == 0
    assert not list((bench.root / "out").rglob("papers*")) and list((bench.root / "out").rglob("toy-local.md"))
