"""Proves that a task with several metrics gives a column for each in its own unit, and that its flags fire."""

import csv
from pathlib import Path
from typing import Any

import pytest

from experiments.report.columns import GRADE, LOSS, PERCENT, Column, unit
from experiments.report.figures import held_out_loss
from experiments.report.grid import build_grid
from experiments.report.loading import NO_PLAN, Entry, read_plan

SCORES = {"seen/exact_match": 0.5, "new/exact_match": 0.25, "held_out_loss": 0.7}


def line(page: str, label: str, result: str = "ours") -> list[str]:
    (found,) = [text for text in page.splitlines() if text.startswith(f"| {label} | {result} |")]
    return [text.strip() for text in found.strip("|").split("|")][2:]


def section(page: str, title: str) -> str:
    return page.split(f"## {title}", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", PERCENT),
        ("held_out_loss", LOSS),
        ("mt_bench/first_turn", GRADE),
        ("humaneval/pass@1", PERCENT),
    ],
)
def test_units(metric: str, expected: Any) -> None:
    assert unit(metric) is expected


def test_words_of_a_metric() -> None:
    assert Column("t", "seen/exact_match").words == "seen templates, exact match"
    assert Column("t", "odd/name").words == "odd, name"
    assert Column("t", "").words == "t"


def test_a_column_for_each_metric_and_no_average(bench, generative) -> None:
    for seed, more in enumerate([0.0, 0.02, 0.04]):
        scores = {name: value + more for name, value in SCORES.items()}
        bench.add(generative("lora", seed, scores))
        bench.add(generative("lora", seed, SCORES), baseline=True)
    page = bench.page()
    assert "| method | result | seen templates, exact match | new templates, exact match | held-out loss |" in page
    assert line(page, "lora") == ["52.00 ± 2.00 (n=3)", "27.00 ± 2.00 (n=3)", "0.7200 ± 0.0200 (n=3)"]
    assert line(page, "lora", "minus baseline") == ["+2.00", "+2.00", "+0.0200"]
    assert "new/exact_match in percent, held_out_loss in nats per target token." in page
    assert "| lora | [47.03, 56.97] | [22.03, 31.97] | [0.6703, 0.7697] |" in page
    assert "| lora | 1e-3 | 0.7200 |" in section(page, "Learning rate and held-out loss (test split")
    assert "| problems | test | 20 | 20 | 64 | — |" in page
    assert "average" not in page and "Random level" not in page
    assert page.count("problems-lora-seed0-problemslora0-0.001.json") == 1
    assert "| lora | 3 | 11.0 |" in page  # costs count a run once


def test_csv_names_the_unit(bench, generative) -> None:
    bench.add(generative("lora", 0, SCORES))
    with (bench.run() / "tables" / "toy-local.csv").open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["metric"], row["mean"], row["unit"]) for row in rows] == [
        ("seen/exact_match", "50.0000", "percent"),
        ("new/exact_match", "25.0000", "percent"),
        ("held_out_loss", "0.7000", "nats per target token"),
    ]


def test_a_metric_that_no_run_has_says_not_run(bench, generative) -> None:
    task = {"name": "problems", "metric": "held_out_loss", "also": ["mt_bench/first_turn"]}
    bench.add(generative("lora", 0, {"held_out_loss": 0.7}, config={"task": task}))
    page = bench.page()
    assert "| held-out loss | MT-Bench, first turn |" in page
    assert line(page, "lora") == ["0.7000 (n=1)", "not run"]


def test_a_search_without_benchmarks_shows_its_loss_only(bench, generative) -> None:
    for rate, loss in [(1e-3, 0.7), (1e-4, 0.9)]:
        record = generative("lora", 0, {"held_out_loss": loss}, learning_rate=rate)
        record.config["eval"]["benchmarks"] = []
        bench.add(record)
    page = bench.page()
    assert "| method | result | held-out loss |" in page
    assert line(page, "lora (lr 1e-3)") == ["0.7000 (n=1)"]
    rates = section(page, "Learning rate and held-out loss")
    assert "| lora (lr 1e-3) | 1e-3 | 0.7000 |" in rates and "| lora (lr 1e-4) | 1e-4 | 0.9000 |" in rates


def test_a_finished_run_without_any_of_its_metrics_is_left_out(bench, generative) -> None:
    bench.add(generative("lora", 0, SCORES), generative("dora", 0, {"other": 1.0}))
    page = bench.page()
    assert "| dora |" not in page
    assert "Left out, not readable as records of this table: problems-dora-seed0-problemsdora0-0.001.json." in page


def test_a_plan_knows_its_tasks_metrics(tmp_path: Path) -> None:
    for folder, text in (
        ("task/problems.yaml", "metric: seen/exact_match\nalso: [held_out_loss]\n"),
        ("experiment/toy.yaml", "local: {tasks: [problems, absent], methods: {lora: {learning_rate: [1.0e-3]}}}\n"),
    ):
        (tmp_path / folder).parent.mkdir()
        (tmp_path / folder).write_text(text)
    plan = read_plan(tmp_path / "experiment" / "toy.yaml", "local")
    assert plan.tasks == {"problems": ("seen/exact_match", "held_out_loss"), "absent": ()}
    grid = build_grid([], plan, "local")
    assert [grid.heading(column) for column in grid.columns] == [
        "absent: absent",
        "problems: seen templates, exact match",
        "problems: held-out loss",
    ]
    assert read_plan(tmp_path / "experiment" / "toy.yaml", "paper") == NO_PLAN


def test_answers_read_three_ways(bench, generative) -> None:
    shares = {"strict": 0.2, "flexible": 0.4, "authors": 0.3, "parse_failures": 0.1}
    for seed in range(2):
        read = {f"seen/{name}": share + seed / 10 for name, share in shares.items()}
        bench.add(generative("lora", seed, SCORES | read))
    bench.add(generative("dora", 0, SCORES))
    page = bench.page()
    table = section(page, "Answers read three ways")
    numbers = ["25.00 ± 7.07 (n=2)", "45.00 ± 7.07 (n=2)", "35.00 ± 7.07 (n=2)", "15.00 ± 7.07 (n=2)"]
    assert f"| lora | seen templates | {' | '.join(numbers)} | 50 |" in table
    assert "dora" not in table
    assert "No number found in 20 % or more" in page and "seeds: lora: seen templates 20.00 %." in page


def test_few_failures_and_no_timeout_are_no_flag(bench, generative) -> None:
    bench.add(generative("lora", 0, SCORES | {"seen/parse_failures": 0.19, "humaneval/timed_out": 0.0}))
    page = bench.page()
    assert "No number found" not in page and "ran out of time" not in page
    assert "Answers read three ways" not in page


def test_timeouts_are_told(bench, generative) -> None:
    bench.add(generative("lora", 0, SCORES | {"humaneval/timed_out": 0.02}))
    page = bench.page()
    assert "Programs that ran out of time, scored as failed; highest share over seeds: lora: HumanEval 2.00 %." in page


def test_judgments_without_a_rating_are_told(bench, generative) -> None:
    for seed, count in enumerate([2.0, 1.0]):
        record = generative("lora", seed, SCORES)
        record.metrics["mt_bench/unparsed_judgments"] = {"value": count, "n": 80}
        bench.add(record)
    assert "Judgments without a rating, in no mean: lora: 3 of 160." in bench.page()


@pytest.mark.parametrize("known", [{"trusted": True}, {"trusted": False}, {}])
@pytest.mark.parametrize("place", ["data", "config"])
def test_only_a_judge_the_record_trusts_is_trusted(bench, generative, known: dict, place: str) -> None:
    task = {"name": "problems", "metric": "held_out_loss", "also": ["mt_bench/first_turn"]}
    judge = {("judge" if place == "data" else "model"): "somewhere/small", **known}
    config = {"task": task, "eval": {"judge": judge if place == "config" else None}}
    data = {"judge": judge} if place == "data" else {}
    bench.add(generative("lora", 0, {"held_out_loss": 0.7, "mt_bench/first_turn": 3.5}, config=config, data=data))
    page = bench.page()
    trusted = known.get("trusted", False)
    assert line(page, "lora") == ["0.7000 (n=1)", "3.50 (n=1)" + ("" if trusted else "§")]
    assert ("§ Judge not trusted (small)" in page) is not trusted


def test_no_published_score_beside_an_untrusted_judge(bench, generative) -> None:
    task = {"name": "wizardlm", "metric": "mt_bench/first_turn", "also": ["held_out_loss"]}
    for trusted, printed in ((False, "—"), (True, "5.61 ± 0.10")):
        record = generative("lora", 0, {"mt_bench/first_turn": 3.5}, experiment="chat", scale="paper", task="wizardlm")
        record.config, record.data = {"task": task}, {"judge": {"model": "small", "trusted": trusted}}
        bench.add(record)
        assert line(bench.page("chat", "paper"), "lora", "LoRA-GA, table 2 [S_MGPO, memory]")[0] == printed


CURVE = [{"step": step, "loss": 2.0 - step / 20, "learning_rate": 1e-3} for step in range(1, 11)]
HELD_OUT = [{**row, **({"held_out_loss": 1.0 / row["step"]} if row["step"] in (5, 10) else {})} for row in CURVE]


def test_held_out_curve_starts_before_the_first_step(generative) -> None:
    record = generative("lora", 0, SCORES, loss_curve=HELD_OUT, step0={"held_out_loss": 3.0})
    assert held_out_loss(record) == {0: 3.0, 5: 0.2, 10: 0.1}
    record.step0 = {"held_out_loss": None}
    assert held_out_loss(record) == {5: 0.2, 10: 0.1}
    record.step0, record.loss_curve = {"held_out_loss": 3.0}, CURVE
    assert held_out_loss(record) == {}  # one point is no curve


def test_held_out_loss_is_a_second_panel(bench, generative) -> None:
    from matplotlib.image import imread

    def shape(*records: Any) -> tuple[int, ...]:
        bench.add(*records)
        first, second = (bench.run(out=name) / "figures" / "toy-local-problems.png" for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
        return imread(first).shape

    one = shape(*(generative("lora", seed, SCORES, loss_curve=CURVE) for seed in range(2)))
    assert "Held-out loss in the picture" not in bench.page()
    step0 = {"held_out_loss": 3.0}
    two = shape(*(generative("dora", seed, SCORES, loss_curve=HELD_OUT, step0=step0) for seed in range(2)))
    assert two[1] == 2 * one[1] and two[0] == one[0]
    assert "Held-out loss in the picture: of the first 24 held-out rows." in bench.page()


def test_a_metric_missing_in_one_seed_is_a_smaller_n(generative) -> None:
    entries = [
        Entry("a", generative("lora", 0, SCORES)),
        Entry("b", generative("lora", 1, {"seen/exact_match": 0.7})),
    ]
    (row,) = build_grid(entries, NO_PLAN, "local").rows
    assert {column.metric: cell.summary.n for column, cell in row.cells.items() if cell.summary} == {
        "seen/exact_match": 2,
        "new/exact_match": 1,
        "held_out_loss": 1,
    }
