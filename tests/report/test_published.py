"""Proves that results/published.yaml is whole: known methods and tasks, declared sources, averages that add up."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.report.columns import Column
from experiments.report.grid import METHODS, TASKS, build_grid
from experiments.report.loading import Plan
from experiments.report.published import PaperRow, PaperTable, differing, read_published, read_tables
from experiments.report.tables import GREY, GREY_END, MainTable, headings, lines

FILE = Path(__file__).resolve().parents[2] / "results" / "published.yaml"
CONTENT = OmegaConf.to_container(OmegaConf.load(FILE))
ROWS = [(key, name, table, row) for key, table in CONTENT["tables"].items() for name, row in table["rows"].items()]
# Whose printed average is not the mean of its printed columns; the file says so in the row's note.
UNEVEN = {("lora_ga_glue_t5base", "LoRA"), ("lora_pro_clip", "DoRA")}
ABLATIONS = {"lora_ga_so", "lora_ga_ga"}
TRUST = {"source", "from_memory", "confidence", "std_from_memory"}
PAPER_TABLES, SOURCES = read_tables(FILE)
PRINTED = [(table, row) for table in PAPER_TABLES for row in table.rows]


@pytest.mark.parametrize(("key", "name", "table", "row"), ROWS, ids=[f"{key}-{name}" for key, name, _, _ in ROWS])
def test_row(key: str, name: str, table: dict, row: dict) -> None:
    assert row["method"] is None or row["method"] in METHODS or row["method"] in ABLATIONS
    assert set(row["source"]) <= set(CONTENT["sources"])
    assert row["from_memory"] == (row["source"] == ["memory"])
    assert 0 <= row["confidence"] <= 1
    if "same_as" in row:
        other, _, original = row["same_as"].partition("/")
        assert CONTENT["tables"][other]["rows"][original]["method"] == row["method"]
        assert "cells" not in row
        return
    assert set(row["cells"]) <= set(table["columns"])
    for cell in row["cells"].values():
        assert {"mean", "std"} <= set(cell) <= {"mean", "std"} | TRUST
    average = row["cells"].get("avg", {}).get("mean")
    if average is not None and (key, name) not in UNEVEN:
        means = [cell["mean"] for column, cell in row["cells"].items() if column != "avg"]
        assert sum(means) / len(means) == pytest.approx(average, abs=0.011)


@pytest.mark.parametrize(("table", "row"), PRINTED, ids=[f"{table.key}-{row.name}" for table, row in PRINTED])
def test_every_cell_has_source_and_confidence_and_memory_is_no_target(table: PaperTable, row: PaperRow) -> None:
    for cell in row.cells.values():
        assert cell.source or cell.mean is None
        assert set(cell.source) <= set(SOURCES)
        assert cell.from_memory == (cell.source == ("memory",))
        assert not (cell.from_memory and cell.is_target)
        assert not (cell.confidence < 0.9 and cell.is_target)


def names(key: str) -> list[str]:
    (table,) = [table for table in PAPER_TABLES if table.key == key]
    return [row.name for row in table.rows]


def test_rows_in_the_papers_order() -> None:
    glue = ["Full", "LoRA", "PiSSA", "rsLoRA", "LoRA+", "DoRA", "AdaLoRA", "LoRA-GA"]
    assert names("lora_ga_glue_t5base") == glue
    assert names("lora_pro_glue_t5base") == [*glue, "LoRA-Pro"]
    assert names("lora_ga_llama2_7b") == [*glue, "LoRA-GA (rank 32)", "LoRA-GA (rank 128)"]
    assert names("lora_ga_ablation") == ["LoRA", "+Gaussian", "+SO", "+GA", "LoRA-GA"]
    ranks = ["LoRA-Pro", "LoRA-Pro (rank 32)", "LoRA-Pro (rank 128)"]
    assert names("lora_pro_llama2_7b") == ["Full FT", *glue[1:], *ranks]
    assert names("lora_one_llama2_7b") == ["LoRA", "LoRA-GA", "LoRA-One"]
    assert names("lora_one_metamath_full") == ["LoRA", "LoRA+", "LoRA-GA", "LoRA-One"]


def test_a_repeated_row_has_the_numbers_of_the_original_and_its_own_trust() -> None:
    (table,) = [table for table in PAPER_TABLES if table.key == "lora_pro_glue_t5base"]
    lora = table.rows[1]
    assert lora.cells["CoLA"].mean == 69.35 and lora.from_memory and not lora.cells["CoLA"].is_target


def test_papers_that_print_unlike_numbers_for_one_cell() -> None:
    unlike = differing(PAPER_TABLES)
    full = unlike["full_ft", 8, Column("metamath", "gsm8k/exact_match")]
    assert [cell.mean for _, _, cell in full] == [54.2, 59.36]
    lora = unlike["lora", 8, Column("metamath", "gsm8k/exact_match")]
    assert [cell.mean for _, _, cell in lora] == [42.08, 59.26, 52.0]
    assert ("lora_one", 8, Column("cola", "accuracy")) not in unlike


def test_every_method_of_the_glue_table_has_a_published_row() -> None:
    rows, _ = read_published(FILE, "glue")
    assert {row.method for row in rows} == set(METHODS)
    for row in rows:
        assert {Column(task, "accuracy") for task in TASKS["paper"]} <= set(row.cells)


def test_rows_of_other_ranks_and_of_other_experiments_stay_out() -> None:
    rows, _ = read_published(FILE, "glue")
    assert not any("table 3" in row.title for row in rows)
    assert read_published(FILE, "glue_lr")[0] == []


@pytest.mark.parametrize(
    ("experiment", "task", "metric", "lora_ga"),
    [
        ("math", "metamath", "gsm8k/exact_match", ["53.60 ± 0.30", f"{GREY}56.44 ± 1.15{GREY_END}†"]),
        ("code", "code_feedback", "humaneval/pass@1", ["19.81 ± 1.46", f"{GREY}26.95 ± 1.30{GREY_END}†"]),
        ("chat", "wizardlm", "mt_bench/first_turn", ["5.95 ± 0.16"]),
    ],
)
def test_llama_tables_stand_beside_runs_not_made(experiment: str, task: str, metric: str, lora_ga: list[str]) -> None:
    published, _ = read_published(FILE, experiment)
    plan = Plan({task: (metric, "held_out_loss")}, {"lora_ga": (2e-5,)})
    columns = [column for row in published for column in row.cells]
    table = MainTable(build_grid([], plan, "paper", [row.method for row in published], columns), None, published)
    assert len(headings(table)) == 2 and headings(table)[1] == "held-out loss"
    printed = [line.texts for line in lines(table) if line.label == "lora_ga"]
    assert printed == [("not run", "not run"), *((text, "—") for text in lora_ga)]


def test_a_printed_number_is_shown_though_we_measure_something_else() -> None:
    published, _ = read_published(FILE, "chat")
    grid = build_grid([], Plan({"wizardlm": ("held_out_loss",)}, {}), "paper", columns=published[0].cells)
    assert grid.columns == (Column("wizardlm", "held_out_loss"), Column("wizardlm", "mt_bench/first_turn"))
