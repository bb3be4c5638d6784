"""Proves the sections below the main table on seeded records with known effects."""

import csv
import re
from typing import Any

import numpy as np
import pytest

from experiments.report.alignment import alignment
from experiments.report.comparison import against_lora, contrasts, over_tasks
from experiments.report.costs import Place, front
from experiments.report.grid import build_grid
from experiments.report.loading import NO_PLAN, Entry, Plan
from experiments.report.sensitivity import RANK, RATE, sensitivity
from experiments.report.speedup import speedup
from experiments.report.tuning import footnotes, searches, shrinkage, shrinkages

LOSSES = {1e-4: 0.9, 1e-3: 0.5, 3e-3: 0.6}


def grid_of(records: list[Any], plan: Plan = NO_PLAN) -> Any:
    return build_grid([Entry(f"{place}.json", made) for place, made in enumerate(records)], plan, "local")


def known_effects(record: Any, gap: float = 0.05, seeds: int = 5) -> list[Any]:
    """LoRA, dora better by `gap` on every task and seed but for a little noise, pissa the same as LoRA but for luck."""
    rng = np.random.default_rng(3)
    made = []
    for task, level in (("movies", 0.80), ("reply", 0.60)):
        for seed in range(seeds):
            luck = rng.normal(0, 0.02)
            made.append(record(task, "lora", seed, level + luck))
            made.append(record(task, "dora", seed, level + luck + gap + rng.normal(0, 0.005)))
            made.append(record(task, "pissa", seed, level + rng.normal(0, 0.02)))
    return made


def test_a_known_effect_is_found_and_none_is_not(record: Any) -> None:
    grid = grid_of(known_effects(record))
    found = {(contrast.method, contrast.column): contrast for contrast in contrasts(grid)}
    assert set(found) == {(m, c) for m in ("dora", "pissa") for c in ("movies", "reply", "average")}
    real = found["dora", "average"]
    assert real.seeds == 5 and real.difference.low is not None and real.difference.high is not None
    assert 0 < real.difference.low < 5 < real.difference.high and real.bootstrap is not None
    assert 4 < real.bootstrap[0] < 5.5 and real.difference.p is not None and real.difference.p < 0.01
    assert real.better > 0.85
    chance = found["pissa", "average"]
    assert chance.difference.low is not None and chance.difference.high is not None
    assert chance.difference.low < 0 < chance.difference.high
    section = against_lora(grid)
    assert section is not None and "all 6 tests" in section.legend
    assert all(float(line[-1]) >= float(line[-2]) for line in section.body)  # Holm only ever raises a p value


def test_paired_intervals_of_the_report_cover_a_known_gap(record: Any) -> None:
    """300 simulated experiments of three seeds: the interval printed holds the gap in about 95 % of them."""
    rng = np.random.default_rng(5)
    held = []
    for _ in range(300):
        luck, noise = rng.normal(0, 0.03, 3), rng.normal(0, 0.01, 3)
        made = [record("movies", "lora", seed, 0.7 + luck[seed]) for seed in range(3)]
        made += [record("movies", "dora", seed, 0.72 + luck[seed] + noise[seed]) for seed in range(3)]
        (contrast,) = contrasts(grid_of(made))
        assert contrast.difference.low is not None and contrast.difference.high is not None
        held.append(contrast.difference.low <= 2.0 <= contrast.difference.high)
    assert 0.91 <= np.mean(held) <= 0.99


def test_only_shared_seeds_are_paired_and_one_seed_has_no_interval(record: Any) -> None:
    made = [record("movies", "lora", 0, 0.8), record("movies", "dora", 0, 0.9), record("movies", "dora", 1, 0.1)]
    (contrast,) = contrasts(grid_of(made))
    assert (contrast.seeds, contrast.difference.value) == (1, pytest.approx(10.0))
    assert contrast.difference.p is None and contrast.bootstrap is None
    assert contrasts(grid_of(made[1:])) == []  # nothing without LoRA


def test_lower_losses_are_better(generative: Any) -> None:
    made = [generative("lora", seed, {"held_out_loss": 0.8 + seed / 100}) for seed in range(3)]
    made += [generative("dora", seed, {"held_out_loss": 0.6 + seed / 90}) for seed in range(3)]
    (contrast,) = [known for known in contrasts(grid_of(made)) if known.column == "held-out loss"]
    assert contrast.better == 1.0 and contrast.difference.value < 0


def test_over_tasks_needs_several_and_every_method_whole(record: Any) -> None:
    made = known_effects(record)
    section = over_tasks(grid_of([*made, record("movies", "adalora", 0, 0.9)]))
    assert section is not None and [line[0] for line in section.body] == ["lora", "dora", "pissa"]
    assert over_tasks(grid_of([known for known in made if known.task == "movies"])) is None


@pytest.fixture
def search(generative: Any) -> Any:
    """Validation runs of a method by learning rate."""

    def make(method: str, losses: dict[float, float], seeds: int = 1, split: str = "validation") -> list[Any]:
        data = {"train": {"n": 64}, "scored": {"split": split, "n": 20, "of": 20}}
        return [
            generative(method, seed, {"held_out_loss": loss}, learning_rate=rate, data=data, run_id=f"{split}{rate:g}")
            for rate, loss in losses.items()
            for seed in range(seeds)
        ]

    return make


def entries(records: list[Any]) -> list[Entry]:
    return [Entry(f"{place}.json", made) for place, made in enumerate(records)]


def test_the_search_chooses_by_validation_rows_alone(search: Any) -> None:
    (found,) = searches(entries([*search("lora", LOSSES), *search("lora", {1e-2: 0.1}, split="test")]))
    assert (found.method, found.best, sorted(found.runs), found.edge) == ("lora", 1e-3, sorted(LOSSES), None)
    (edge,) = searches(entries(search("lora", {1e-4: 0.9, 1e-3: 0.5})))
    assert edge.edge == "highest"


def test_a_diverged_rate_is_not_chosen(search: Any) -> None:
    made = search("lora", LOSSES)
    made[1].status = "diverged"
    (found,) = searches(entries(made))
    assert found.best == 3e-3


def test_shrinking_of_a_known_advantage(search: Any) -> None:
    made = [*search("lora", LOSSES), *search("lora_ga", {1e-4: 0.45, 1e-3: 0.8}), *search("dora", {2e-2: 0.4})]
    found = searches(entries(made))
    lines = {line.method: line for line in shrinkages(found)}
    assert (lines["lora_ga"].shared, lines["lora_ga"].tuned) == (pytest.approx(0.45), pytest.approx(0.05))
    assert lines["dora"].shared is None and lines["dora"].tuned == pytest.approx(0.1)
    section = shrinkage(found, "toy_lr")
    assert section is not None
    assert any("11 % of the advantage is left" in note for note in section.notes)
    assert any("LoRA was not run at 2e-2" in note for note in section.notes)


def test_footnotes_name_grid_budget_choice_and_departures(search: Any, generative: Any) -> None:
    made = entries([*search("lora", LOSSES, seeds=2), *search("dora", {1e-3: 0.5})])
    grid = grid_of([generative("lora", 0, {"held_out_loss": 0.4}, learning_rate=3e-3)])
    notes = footnotes(searches(made), "toy_lr", made, Plan({}, {"lora": (1e-4, 1e-3, 3e-3)}), grid)
    assert notes[0] == (
        "Learning rates: lowest mean loss on the 20 validation rows of problems (experiment=toy_lr), seeds a rate: 1 to"
        " 2; one grid for every method: 1e-4, 1e-3, 3e-3; runs a method: 1 to 6, of 3 planned. Chosen: lora 1e-3, dora "
        "1e-3."
    )
    assert "dora (only tried)" in notes[1]
    assert notes[2] == "Not the rate that the search on problems chose: lora 3e-3."


CURVE = (1.0, 0.8, 0.6, 0.5, 0.45)


def trained(generative: Any, method: str, losses: tuple[float, ...], seed: int = 0, **changes: Any) -> Any:
    """A run whose held-out loss was measured every 10 steps of 2 s and 100 tokens each, after 5 s of start."""
    rows = [
        {"step": step, "loss": losses[0], "tokens": 100 * step, "seconds": 2.0 * step,
         **({"held_out_loss": losses[step // 10]} if step % 10 == 0 else {})}
        for step in range(1, 10 * len(losses) - 9)
    ]  # fmt: skip
    made = generative(method, seed, {"held_out_loss": losses[-1]}, loss_curve=rows, **changes)
    made.step0, made.cost["init_seconds"] = {"held_out_loss": losses[0]}, 5.0
    return made


def test_speed_up_by_hand(generative: Any) -> None:
    fast = (1.0, 0.6, 0.45, 0.4, 0.3)  # at LoRA's final loss after 20 of 40 steps
    made = [trained(generative, "lora", CURVE, seed) for seed in range(2)]
    made += [trained(generative, "dora", fast), trained(generative, "dora", CURVE[:1] + (0.9,) * 4, 1)]
    made += [trained(generative, "pissa", (1.0, 0.9, 0.9, 0.9, 0.9), seed) for seed in range(2)]
    section = speedup(grid_of(made))
    assert section is not None
    seconds = f"{(5 + 80) / (5 + 40):.2f}"
    assert list(section.body) == [
        ["dora", "problems", "2.00 x (1 of 2)", "2.00 x (1 of 2)", f"{seconds} x (1 of 2)"],
        ["pissa", "problems", *["not reached (0 of 2)"] * 3],
    ]
    assert "every 10 steps" in section.legend


def test_seconds_of_another_machine_are_not_compared(generative: Any) -> None:
    other = {"cpu": "AVX512", "cpu_count": 64, "torch_threads": 64}
    section = speedup(
        grid_of([trained(generative, "lora", CURVE), trained(generative, "dora", CURVE, 0, environment=other)])
    )
    assert section is not None and section.body[0][2:] == ["1.00 x (1 of 1)", "1.00 x (1 of 1)", "not comparable"]


def test_no_speed_up_where_the_loss_was_not_measured_on_the_way(record: Any) -> None:
    assert speedup(grid_of([record("movies", "lora", 0, 0.8), record("movies", "dora", 0, 0.9)])) is None


def measured(record: Any, method: str, seed: int, captured: list[float], **changes: Any) -> Any:
    """A run whose steps 1, 4 and 8 of 8 were measured; the first, of rate zero, has no alignment."""
    rows = [{"step": step, "loss": 1.0} for step in range(1, 9)]
    for place, (step, value) in enumerate(zip((1, 4, 8), captured, strict=True)):
        rows[step - 1] |= {"captured": value, **({"alignment": -value / 2} if place else {})}
    return record("movies", method, seed, 0.8, loss_curve=rows, **changes)


def test_alignment_by_hand(record: Any) -> None:
    made = [measured(record, "lora", seed, [0.1, 0.2 + seed / 10, 0.6]) for seed in range(2)]
    made += [measured(record, "full_ft", 0, [1.0, 1.0, 1.0]), record("reply", "lora", 0, 0.7)]
    section, figures = alignment(grid_of(made), "toy")
    assert section is not None and section.pictures == ("toy-movies-alignment",) == tuple(figures)
    assert list(section.body) == [
        ["full_ft", "movies", "1", "-0.5000", "-0.5000", "-0.5000", "1.0000", "1.0000", "1.0000"],
        ["lora", "movies", "2", "-0.1250", "-0.2125", "-0.3000", "0.1000", "0.3167", "0.6000"],
    ]
    left, right = figures["toy-movies-alignment"].axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("alignment", "captured energy")
    lines = {line.get_label(): line for line in right.lines}
    assert list(lines["lora, n=2"].get_xdata()) == [1, 4, 8]
    assert list(lines["lora, n=2"].get_ydata()) == pytest.approx([0.1, 0.25, 0.6])
    assert [list(line.get_xdata()) for line in left.lines] == [[4, 8], [4, 8]]
    (band,) = right.collections
    assert (band.get_datalim(right.transData).y0, band.get_datalim(right.transData).y1) == pytest.approx((0.1, 0.6))


def test_no_alignment_where_no_step_was_measured_and_none_of_an_ambiguous_cell(record: Any) -> None:
    assert alignment(grid_of([record("movies", "lora", 0, 0.8)]), "toy") == (None, {})
    twice = [measured(record, "lora", 0, [0.1, 0.2, 0.3], run_id=name) for name in "ab"]
    assert alignment(grid_of(twice), "toy") == (None, {})


def test_a_run_that_was_measured_stands_in_the_row_of_those_that_were_not(record: Any) -> None:
    made = [record("movies", "lora", seed, 0.8) for seed in range(2)]
    for one, every in zip(made, (None, 4), strict=True):
        one.config["train"] = {"max_steps": 8, "alignment_every": every}
    assert [(row.label, len(row.entries)) for row in grid_of(made).rows] == [("lora", 2)]


def test_rates_and_ranks(search: Any, generative: Any) -> None:
    section, figures = sensitivity(grid_of(search("lora", LOSSES, seeds=2)), "toy", RATE)
    assert section is not None and list(figures) == ["toy-rates"]
    assert list(section.header) == ["method", "task", "1e-4", "1e-3", "3e-3"]
    assert section.body[0][3] == "0.5000 ± 0.0000 (n=2)" and len(section.body[0][3].entries) == 2
    assert re.findall(r"\*\*.*?\*\*", section.markdown("figures")) == ["**0.5000 ± 0.0000 (n=2)**"]
    made = []
    for rank, loss in ((8, 0.6), (32, 0.5)):
        one = generative("lora", 0, {"held_out_loss": loss}, run_id=f"r{rank}")
        one.config["method"] = {"name": "lora", "r": rank}
        made.append(one)
    grid = grid_of(made)
    assert [row.label for row in grid.rows] == ["lora (rank 8)", "lora (rank 32)"]
    ranks, pictures = sensitivity(grid, "toy", RANK)
    assert ranks is not None and list(ranks.body) == [["lora", "problems", "0.6000 (n=1)", "0.5000 (n=1)"]]
    assert list(pictures) == ["toy-ranks"]
    assert sensitivity(grid_of(made[:1]), "toy", RANK) == (None, {})


def test_front_by_hand() -> None:
    row: Any = None
    places = [Place(row, quality, cost) for quality, cost in ((80, 10), (85, 20), (84, 30), (90, 40), (79, 10))]
    assert [place.quality for place in front(places, lower_is_better=False)] == [80, 85, 90]
    assert [place.quality for place in front(places, lower_is_better=True)] == [79]


def test_the_sections_are_on_the_page_in_csv_and_in_latex(bench: Any, generative: Any) -> None:
    bench.add(*(trained(generative, method, CURVE, seed) for method in ("lora", "dora") for seed in range(2)))
    out = bench.run()
    page = (out / "tables" / "toy-local.md").read_text(encoding="utf-8")
    for title in ("Against LoRA", "Convergence", "Speed-up to lora's final", "Cost, mean", "Quality against memory"):
        assert f"## {title}" in page
    pictures = {path.stem for path in (out / "figures").iterdir()}
    assert pictures == {"toy-local-problems", "toy-local-problems-budget", "toy-local-cost"}
    assert all(f"(../figures/{name}.png)" in page for name in pictures)
    with (out / "tables" / "toy-local-analysis.csv").open(encoding="utf-8") as handle:
        rows = {(row["table"], row["row"], row["quantity"]): row["value"] for row in csv.DictReader(handle)}
    assert rows["speed-up", "dora | problems", "fewer steps"] == "1.00 x (2 of 2)"
    tex = (out / "tables" / "toy-local-analysis.tex").read_text(encoding="utf-8")
    assert tex.isascii() and r"\label{tab:toy-local-speed-up}" in tex and tex.count(r"\toprule") == 4
