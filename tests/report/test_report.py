"""Proves that records with known scores give exactly the known cells, and that nothing is hidden or chosen silently."""

import csv
import logging
from pathlib import Path

import pytest

from experiments.report.__main__ import main

CURVE = [{"step": step, "loss": 3.0 / step, "learning_rate": 1e-3} for step in range(1, 31)]


def cells(page: str, label: str, result: str = "ours") -> list[str]:
    """Texts of one line of the main table."""
    start = f"| {label} | {result}"
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    return [text.strip() for text in line.strip("|").split("|")][2:]


def test_cells_average_and_order(bench, record) -> None:
    for seed, movies, reply in [(0, 0.80, 0.90), (1, 0.82, 0.90), (2, 0.84, 0.90)]:
        bench.add(record("reply", "zeta_ablation", seed, reply), record("movies", "zeta_ablation", seed, movies))
        bench.add(record("reply", "full_ft", seed, reply), record("movies", "full_ft", seed, movies))
    page = bench.page()
    assert "| method | result | movies | reply | average |" in page
    assert cells(page, "full_ft") == ["82.00 ± 2.00 (n=3)", "90.00 ± 0.00 (n=3)", "86.00 ± 1.00 (n=3)"]
    assert page.index("| full_ft | ours") < page.index("| zeta_ablation | ours")
    assert "| full_ft | [77.03, 86.97] |" in page
    assert "| full_ft | 6 | 11.0 | 20.0 | 1,000.0 | 1,234,567 |" in page
    assert "| full_ft | 1e-3 | 0.1800 | 0.1000 |" in page
    assert "| movies | test | 400 | 400 | 64 | 50.00 |" in page
    assert "movies-full_ft-seed1-moviesfull_ft1-0.001.json" in page
    assert "Single seed" not in page


def test_single_failed_diverged_and_missing(bench, record) -> None:
    bench.add(record("movies", "lora", 0, 0.80), record("movies", "lora", 1, None))
    bench.add(record("movies", "dora", 0, None), record("reply", "dora", 0, None, status="diverged"))
    page = bench.page()
    assert cells(page, "lora") == ["80.00 (n=1), 1 failed", "not run", "—"]
    assert cells(page, "dora") == ["failed", "diverged", "—"]
    assert "2 runs failed, in no mean: lora: movies seed 1; dora: movies seed 0." in page
    assert "1 run diverged, in no mean: dora: reply seed 0." in page
    assert "Single seed, so no spread is known and small differences mean nothing: every cell." in page
    assert r"OSError: no such\|file" in page


def test_costs_are_never_averaged_over_machines(bench, record) -> None:
    slow = {**record("movies", "lora", 0, 0.8).environment, "torch_threads": 1}
    bench.add(record("movies", "lora", 0, 0.80), record("movies", "lora", 3, 0.80, environment=slow))
    page = bench.page()
    assert "| lora [1] | 1 | 13.0 | 20.0 |" in page and "| lora [2] | 1 | 10.0 | 20.0 |" in page
    assert "[1] CPU AVX2, 2 cores, 1 torch threads; [2] CPU AVX2, 2 cores, 2 torch threads" in page
    assert "Mixed hardware: costs are listed apart for each." in page


def test_speeds_of_scoring_are_shown_where_records_have_them(bench, record) -> None:
    bench.add(record("movies", "lora", 0, 0.80), record("movies", "full_ft", 0, 0.80))
    assert "a second" not in bench.page()
    with_speed = record("movies", "lora", 1, 0.80)
    with_speed.cost["classified_rows_per_second"] = 40.0
    bench.add(with_speed)
    page = bench.page()
    assert "| initialisation seconds | rows classified a second |" in page and "tokens generated" not in page
    assert "| lora | 2 | 10.5 | 20.0 | 1,000.0 | 1,234,567 | — | — | 40.0 |" in page
    assert "| full_ft | 1 | 10.0 | 20.0 | 1,000.0 | 1,234,567 | — | — | — |" in page


def test_average_over_unlike_seeds_has_no_spread(bench, record) -> None:
    bench.add(record("movies", "lora", 0, 0.80), record("movies", "lora", 1, 0.90), record("reply", "lora", 0, 0.75))
    assert cells(bench.page(), "lora")[-1] == "80.00"


def test_damaged_and_foreign_files_are_named_and_skipped(bench, record, caplog: pytest.LogCaptureFixture) -> None:
    bench.add(record("movies", "lora", 0, 0.80))
    folder = bench.root / "runs" / "toy-local"
    (folder / "damaged.json").write_text('{"schema_version": 1, "run')
    (folder / "list.json").write_text("[]")
    bench.add(record("movies", "pissa", 0, 0.80, config={}))
    other = record("movies", "lora", 0, 0.10, experiment="other")
    bench.add(other)
    (bench.root / "runs" / "other-local").rename(bench.root / "elsewhere")
    for path in (bench.root / "elsewhere").iterdir():
        path.rename(folder / "foreign.json")
    with caplog.at_level(logging.WARNING):
        page = bench.page()
    assert cells(page, "lora") == ["80.00 (n=1)", "80.00 (n=1)"]
    assert "| pissa |" not in page
    for name in ("damaged.json", "list.json", "foreign.json", "movies-pissa-seed0-moviespissa0-0.001.json"):
        assert name in caplog.text
        assert name in page


def test_learning_rates_of_one_cell_are_kept_apart(bench, record) -> None:
    bench.add(record("movies", "lora", 0, 0.80), record("movies", "lora", 0, 0.70, learning_rate=2e-4))
    page = bench.page()
    assert cells(page, "lora (lr 1e-3)")[0] == "80.00 (n=1)"
    assert cells(page, "lora (lr 2e-4)")[0] == "70.00 (n=1)"


def test_learning_rate_for_each_task_is_one_row_and_said(bench, record) -> None:
    bench.add(record("movies", "lora", 0, 0.80), record("reply", "lora", 0, 0.70, learning_rate=2e-4))
    page = bench.page()
    assert cells(page, "lora") == ["80.00 (n=1)", "70.00 (n=1)", "75.00 (n=1)"]
    assert "lora has a learning rate for each task: movies 1e-3, reply 2e-4." in page


def test_other_settings_of_one_cell_are_kept_apart(bench, record) -> None:
    first = record("movies", "lora", 0, 0.80)
    config = {**first.config, "train": {"max_steps": 5}}
    bench.add(first, record("movies", "lora", 0, 0.70, config=config, run_id="other"))
    page = bench.page()
    assert page.count("| lora (settings ") >= 2
    assert "| lora | ours" not in page


def test_keys_that_came_later_do_not_part_a_row(bench, record) -> None:
    first = record("movies", "lora", 0, 0.80)
    later = {**first.config, "train": {**first.config.get("train", {}), "compile": False, "alignment_every": None}}
    bench.add(first, record("movies", "lora", 1, 0.90, config=later))
    assert cells(bench.page(), "lora")[0] == "85.00 ± 7.07 (n=2)"
    bench.add(record("movies", "lora", 2, 0.90, config={**later, "train": {**later["train"], "compile": True}}))
    assert bench.page().count("| lora (settings ") >= 2


def test_a_seed_twice_with_the_same_settings_shows_no_number(bench, record) -> None:
    bench.add(record("movies", "lora", 0, 0.80), record("movies", "lora", 0, 0.70, run_id="again"))
    page = bench.page()
    assert cells(page, "lora") == ["ambiguous", "—"]
    assert "Ambiguous: lora on movies has a seed more than once" in page


def test_random_level_dirty_tree_mixed_commits_and_rows(bench, record) -> None:
    dirty = {"git_commit": "b" * 40, "git_dirty": True}
    bench.add(record("movies", "lora", 0, 0.51), record("movies", "lora", 1, 0.90, environment=dirty))
    bench.add(record("movies", "dora", 0, 0.90, data={"scored": {"split": "test", "n": 32, "sha256": "x"}}))
    page = bench.page()
    assert cells(page, "lora")[0] == "70.50 ± 27.58 (n=2)°"
    assert "lora: movies (1 of 2 runs)." in page
    assert "Dirty tree: 1 of 3 runs" in page
    assert f"Mixed commits: {'a' * 40}, {'b' * 40}." in page
    assert "Mixed data: the runs on movies differ" in page


def test_difference_to_the_baseline(bench, record) -> None:
    for seed, value in enumerate([0.78, 0.80, 0.82]):
        bench.add(record("movies", "lora", seed, value), baseline=True)
        bench.add(record("movies", "full_ft", seed, value, learning_rate=5e-5), baseline=True)
    bench.add(record("movies", "lora", 0, 0.815), record("movies", "full_ft", 0, 0.80))
    bench.add(record("movies", "dora", 0, 0.80))
    page = bench.page()
    assert cells(page, "lora", "minus baseline") == ["+1.50", "+1.50"]
    assert cells(page, "full_ft", "minus baseline") == ["+0.00‡", "+0.00"]
    assert cells(page, "dora", "minus baseline") == ["baseline: none", "—"]
    assert "‡ The baseline has another learning rate" in page


def test_no_baseline_and_no_published_number_at_local_scale(bench, record) -> None:
    bench.add(record("movies", "lora", 0, 0.80, experiment="glue"))
    page = bench.page("glue")
    assert "Baseline: none." in page
    assert "minus baseline" not in page
    for printed in ("82.08", "LoRA-GA, table", "†", "published"):
        assert printed not in page
    assert cells(page, "lora_ga")[0] == "not run"  # in the plan of conf/experiment/glue.yaml


def test_paper_scale_sets_published_beside_ours(bench, record) -> None:
    for seed, value in enumerate([0.93, 0.94, 0.95]):
        bench.add(record("sst2", "lora", seed, value, experiment="glue", scale="paper"))
    page = bench.page("glue", "paper")
    assert cells(page, "lora") == ["not run", "94.00 ± 1.00 (n=3)", "not run", "not run", "not run", "—"]
    printed = ["85.30 ± 0.04", "94.04 ± 0.11", "69.35 ± 0.05", "92.96 ± 0.09", "68.38 ± 0.01", "82.08"]
    assert cells(page, "lora", "LoRA-GA, table 1 [S_MGPO, S_GA2, memory]") == printed
    assert cells(page, "lora_one") == ["not run"] * 5 + ["—"]
    assert cells(page, "lora_one", "LoRA-One, table 2 [memory]")[-1] == r"$\color{gray}{88.73}$†"
    assert "† From memory only" in page
    assert "- S_ALT: AltLoRA paper" in page
    assert "minus baseline" not in page


def test_csv_has_a_line_for_each_cell(bench, record) -> None:
    for seed, value in enumerate([0.80, 0.82, 0.84]):
        bench.add(record("movies", "lora", seed, value))
        bench.add(record("movies", "lora", seed, 0.81), baseline=True)
    with (bench.run() / "tables" / "toy-local.csv").open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["task"], row["origin"]) for row in rows] == [("movies", "ours"), ("average", "ours")]
    first = rows[0]
    assert (first["mean_percent"], first["std_percent"], first["n"]) == ("82.0000", "2.0000", "3")
    assert first["difference_to_baseline"] == "1.0000"
    assert (first["ci95_low"], first["ci95_high"]) == ("77.0317", "86.9683")


def test_latex_is_escaped_and_has_rules(bench, record) -> None:
    bench.add(record("movies", "lora_ga", 0, 0.80), record("movies", "a&b%$#{}~^\\", 0, 0.51, run_id="x"))
    bench.add(record("movies", "lora_ga", 1, 0.82))
    text = (bench.run() / "tables" / "toy-local.tex").read_text(encoding="utf-8")
    assert r"lora\_ga & ours & 81.00 $\pm$ 1.41 (n=2) & 81.00 $\pm$ 1.41 (n=2) \\" in text
    assert r"a\&b\%\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{} & ours & 51.00 (n=1)$^\circ$" in text
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{table}"):
        assert rule in text
    assert text.isascii()


def test_same_records_give_the_same_bytes(bench, record) -> None:
    for seed in range(2):
        for method in ("lora", "full_ft", "lora_pro"):
            bench.add(record("movies", method, seed, 0.8 + seed / 100, loss_curve=CURVE))
    first, second = bench.run(out="one"), bench.run(out="two")
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert [str(name) for name in names] == [
        *(f"figures/toy-local-{name}.{kind}" for name in ("cost", "movies") for kind in ("pdf", "png")),
        *(f"tables/toy-local-analysis.{kind}" for kind in ("csv", "tex")),
        *(f"tables/toy-local.{kind}" for kind in ("csv", "md", "tex")),
    ]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert str(bench.root) not in (first / "tables" / "toy-local.md").read_text(encoding="utf-8")


def test_no_figure_without_a_loss_curve(bench, record) -> None:
    bench.add(record("movies", "lora", 0, 0.8), record("reply", "lora", 0, None, loss_curve=CURVE))
    out = bench.run()
    assert not list(out.rglob("*.png"))
    assert "Convergence" not in (out / "tables" / "toy-local.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=glue", "record=x"], "error: unknown key record; did you mean records?"),
        (["experiment=glue", "--fast"], "error: '--fast' is not of the form key=value"),
        (["experiment=../glue", "scale=local"], "error: say which experiment"),
        (["experiment=glue", "scale=huge"], "error: scale=huge is not one of local, paper"),
        (["experiment=nothing"], "error: no experiment=nothing at scale=local"),
    ],
)
def test_wrong_settings_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, f"out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
