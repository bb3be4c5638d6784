"""Proves that results/published.yaml is whole: known methods and tasks, declared sources, averages that add up."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.report.grid import METHODS, TASKS
from experiments.report.loading import read_published

FILE = Path(__file__).resolve().parents[2] / "results" / "published.yaml"
CONTENT = OmegaConf.to_container(OmegaConf.load(FILE))
ROWS = [(key, name, table, row) for key, table in CONTENT["tables"].items() for name, row in table["rows"].items()]
# Whose printed average is not the mean of its printed columns; the file says so in the row's note.
UNEVEN = {("lora_ga_glue_t5base", "LoRA")}


@pytest.mark.parametrize(("key", "name", "table", "row"), ROWS, ids=[f"{key}-{name}" for key, name, _, _ in ROWS])
def test_row(key: str, name: str, table: dict, row: dict) -> None:
    assert row["method"] is None or row["method"] in METHODS
    assert set(row["cells"]) <= set(table["columns"])
    assert set(row["source"]) <= set(CONTENT["sources"])
    assert row["from_memory"] == (row["source"] == ["memory"])
    assert 0 <= row["confidence"] <= 1
    for cell in row["cells"].values():
        assert set(cell) == {"mean", "std"}
    average = row["cells"].get("avg", {}).get("mean")
    if average is not None and (key, name) not in UNEVEN:
        means = [cell["mean"] for column, cell in row["cells"].items() if column != "avg"]
        assert sum(means) / len(means) == pytest.approx(average, abs=0.011)


def test_every_method_of_the_glue_table_has_a_published_row() -> None:
    rows, _ = read_published(FILE, "glue")
    assert {row.method for row in rows} == set(METHODS)
    for row in rows:
        assert set(TASKS["paper"]) <= set(row.cells)


def test_rows_of_other_ranks_and_of_other_experiments_stay_out() -> None:
    rows, _ = read_published(FILE, "glue")
    assert not any("table 3" in row.title for row in rows)
    assert read_published(FILE, "glue_lr")[0] == []
