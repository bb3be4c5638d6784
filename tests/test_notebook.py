"""The notebook runs from top to bottom on the committed records, says what the report says, and holds no outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from lora_ga.errors import SetupError
from lora_ga.records import load_runs

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "convergence.ipynb"
BASELINE = ROOT / "results" / "baseline"


@pytest.fixture(scope="module")
def executed() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("print(speed_up.to_json(orient='index'))"))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    return client.execute(env={"PYTHONPATH": str(ROOT)})


def test_it_is_stored_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
def test_it_draws_its_pictures(executed) -> None:
    pictures = [o for cell in executed.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 2


@pytest.mark.slow
def test_its_speed_up_is_the_reports(executed) -> None:
    """Steps alone; the page counts over the same records by code of its own."""
    found = json.loads(executed.cells[-1].outputs[0].text)
    page = (BASELINE / "math-local" / "tables" / "math-local.md").read_text()
    section = page.split("## Speed-up to lora")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in section.splitlines() if "|" in line]
    rows = {method: steps for method, _, steps, *_ in cells}
    assert len(found) == 5
    for method, by_seed in found.items():
        reached = [value for value in by_seed.values() if value is not None]
        numbers = re.findall(r"[\d.]+", rows[method])
        if reached:
            assert numbers == [f"{sum(reached) / len(reached):.2f}", str(len(reached)), str(len(by_seed))]
        else:
            assert rows[method] == f"not reached (0 of {len(by_seed)})"


def test_runs_as_a_frame() -> None:
    runs = load_runs(BASELINE / "math-local")
    assert len(runs) == 18 and set(runs.seed) == {0, 1, 2} and (runs.status == "finished").all()
    first = runs.iloc[0]
    record = json.loads(Path(first.path).read_text())
    assert first.held_out_loss == record["metrics"]["held_out_loss"]["value"]
    assert first["cost/train_seconds"] == record["cost"]["train_seconds"]
    assert first.curve.step.tolist() == list(range(53))
    assert first.curve.held_out_loss[0] == record["step0"]["held_out_loss"]


def test_a_damaged_file_is_named_and_left_out(tmp_path, caplog) -> None:
    source = next((BASELINE / "math-local" / "records").glob("*.json"))
    (tmp_path / "whole.json").write_text(source.read_text())
    (tmp_path / "half.json").write_text(source.read_text()[:200])
    runs = load_runs(tmp_path)
    assert isinstance(runs, pd.DataFrame) and runs.path.tolist() == [str(tmp_path / "whole.json")]
    assert "half.json is not a run record" in caplog.text


def test_no_record_at_all_is_an_error(tmp_path) -> None:
    with pytest.raises(SetupError, match="holds no run record"):
        load_runs(tmp_path)
