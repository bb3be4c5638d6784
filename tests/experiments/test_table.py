"""Proves the whole path, from the shipped experiment (on a tiny model) to its table: every cell has its record."""

import re
from pathlib import Path

import pytest

from experiments.plan import expand
from experiments.report.__main__ import main as report
from experiments.run import run


@pytest.mark.slow
def test_config_to_table(tmp_path: Path) -> None:
    runs = expand(
        ["experiment=glue", f"records={tmp_path}/runs", f"outputs={tmp_path}/out",
         'overrides=["model=llama_tiny","train.max_steps=3","eval.limit=30"]']
    )  # fmt: skip
    tasks = {planned.config.task.name for planned in runs}
    methods = {planned.config.method_name for planned in runs}
    assert methods == {"full_ft", "lora", "lora_ga", "lora_one", "lora_pro"} and len(tasks) >= 3
    for planned in runs:
        assert run(planned.config) == planned.record
        assert planned.state == "finished"
    assert not report(["experiment=glue", f"records={tmp_path}/runs", f"baseline={tmp_path}/none", f"out={tmp_path}"])
    page = (tmp_path / "tables" / "glue-local.md").read_text()
    assert "not run" not in page.split("## Learning rate")[0]
    for planned in runs:
        assert planned.record.name in page
    assert len(re.findall(r"\(n=1\)", page)) >= len(runs)
    for task in tasks:
        assert (tmp_path / "figures" / f"glue-local-{task}.png").stat().st_size > 5000
