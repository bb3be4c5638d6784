"""Proves that known protocol and method effects come out of the two-way table, and that gaps stay gaps."""

import csv
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from experiments.report.loading import Entry, Plan
from experiments.report.protocols import by_protocol, effects, rescored, scores, summary_lines

NAMES = ("common", "lora_ga")
METHODS = np.array([0.0, 3.0, 6.0])
PROTOCOLS = np.array([0.0, 10.0])
finite = st.floats(-100, 100).map(lambda value: round(value, 3))


def test_known_effects() -> None:
    known = effects(40 + METHODS[:, None] + PROTOCOLS[None, :])
    assert known.protocol_range == pytest.approx(10)
    assert known.protocol_std == pytest.approx(10 / 2**0.5)
    assert known.method_range == pytest.approx(6)
    assert known.method_std == pytest.approx(3)
    assert known.residual_std == pytest.approx(0, abs=1e-9)


def test_interaction_is_the_rest() -> None:
    known = effects(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert (known.protocol_std, known.method_std) == pytest.approx((0, 0))
    assert (known.protocol_range, known.method_range) == (2, 2)
    assert known.residual_std == pytest.approx(2)  # four squares of 1 over one degree of freedom


@given(arrays(float, (3, 4), elements=finite), finite)
def test_a_constant_changes_nothing_and_transposing_swaps(table: np.ndarray, constant: float) -> None:
    first, moved, turned = effects(table), effects(table + constant), effects(table.T)
    assert vars(moved) == pytest.approx(vars(first), abs=1e-6)
    assert (turned.protocol_range, turned.protocol_std) == pytest.approx(
        (first.method_range, first.method_std), abs=1e-6
    )
    assert turned.residual_std == pytest.approx(first.residual_std, abs=1e-6)


@pytest.mark.parametrize("table", [np.ones((1, 3)), np.ones((3, 1)), np.array([[1.0, np.nan], [1.0, 1.0]])])
def test_refuses_what_is_no_whole_table(table: np.ndarray) -> None:
    with pytest.raises(ValueError, match="two-way table"):
        effects(table)


@pytest.fixture
def scored(generative: Any) -> Any:
    """One scoring of a trained model, its seen and new score in percent."""

    def make(method: str, protocol: str, seen: float, seed: int = 0, **changes: Any) -> Any:
        metrics = {"seen/exact_match": seen / 100, "new/exact_match": seen / 200, "held_out_loss": 0.7}
        run_id = f"{method}{protocol}{seed}"
        settings = {"experiment": "toy_protocols", "protocol": protocol, "run_id": run_id} | changes
        return generative(method, seed, metrics, **settings)

    return make


def known_effects(scored: Any) -> list[Any]:
    return [
        scored(method, protocol, 40 + METHODS[i] + PROTOCOLS[j] + seed, seed)
        for i, method in enumerate(("lora", "lora_ga", "lora_pro"))
        for j, protocol in enumerate(NAMES)
        for seed in range(2)
    ]


def test_page_csv_and_tex(bench, scored) -> None:
    bench.add(*known_effects(scored), scored("dora", "common", 90.0))
    out = bench.run("toy_protocols") / "tables"
    page = (out / "toy_protocols-local.md").read_text(encoding="utf-8")
    seen, new = page.split("## problems: ")[1:3]
    assert seen.startswith("seen templates, exact match, in percent") and new.startswith("new templates")
    assert "| method | common | lora_ga |" in seen
    assert "| lora_ga | 43.50 ± 0.71 (n=2) | 53.50 ± 0.71 (n=2) |" in seen
    assert "| dora | 90.00 (n=1) | not run |" in seen
    assert "Owed to the protocol: 10.00 points (max - min, mean over methods); std 7.07." in seen
    assert "Owed to the method: 6.00 points (max - min, mean over protocols); std 3.00." in seen
    assert "Left over, owed to neither alone: std 0.00." in seen
    assert "Over the 3 methods scored under all 2 protocols: lora, lora_ga, lora_pro." in seen
    assert "Owed to the protocol: 5.00 points" in new
    assert "problems-lora-seed0-loracommon0-0.001.json" in page
    assert "Mixed protocols" not in page
    with (out / "toy_protocols-local.csv").open(encoding="utf-8") as handle:
        rows = [row for row in csv.DictReader(handle) if row["metric"] == "seen/exact_match"]
    assert [
        (r["method"], r["protocol"], r["status"], r["mean"], r["in_block"]) for r in rows if r["method"] == "dora"
    ] == [
        ("dora", "common", "finished", "90.0000", "false"),
        ("dora", "lora_ga", "not run", "", "false"),
    ]
    tex = (out / "toy_protocols-local.tex").read_text(encoding="utf-8")
    assert tex.isascii() and tex.count(r"\begin{table}") == 2
    assert r"lora\_pro & 46.50 $\pm$ 0.71 (n=2) & 56.50 $\pm$ 0.71 (n=2) \\" in tex


def test_protocols_are_compared_on_the_seeds_they_share(scored) -> None:
    records = [*known_effects(scored), scored("lora", "common", 1000.0, seed=2)]
    entries = [Entry(str(place), record) for place, record in enumerate(records)]
    (seen, _) = scores(by_protocol(entries, Plan({}, {}), "local"))
    assert seen.block()["lora"] == pytest.approx({"common": 40.5, "lora_ga": 50.5})
    assert "10.00 points" in summary_lines(seen)[0]


def test_one_method_or_one_protocol_is_no_comparison(scored) -> None:
    for records in (
        [scored("lora", name, 40.0) for name in NAMES],
        [scored(m, "common", 40.0) for m in ("lora", "dora")],
    ):
        entries = [Entry(str(place), record) for place, record in enumerate(records)]
        (line,) = summary_lines(scores(by_protocol(entries, Plan({}, {}), "local"))[0])
        assert line.startswith("No comparison")


def test_a_failed_and_a_planned_scoring_say_so(scored) -> None:
    failed = scored("lora", "common", 40.0, status="failed")
    failed.metrics = {}
    plan = Plan({"problems": ("seen/exact_match", "held_out_loss")}, {"dora": (1e-3,)}, (), NAMES)
    (table,) = [t for t in scores(by_protocol([Entry("f", failed)], plan, "local")) if t.column.metric[:4] == "seen"]
    assert table.protocols == NAMES
    assert {name: len(cell.entries) for name, cell in table.cells["dora"].items()} == {"common": 0, "lora_ga": 0}
    assert table.cells["lora"]["common"].count("failed") == 1


def test_only_the_same_training_under_several_protocols_is_rescored(scored) -> None:
    same = [Entry(name, scored("lora", name, 40.0)) for name in NAMES]
    assert rescored(same)
    for entry in same:
        entry.record.config["protocol"] = {"name": entry.record.protocol}
    assert not rescored(same)
    assert not rescored(same[:1])


def test_same_records_give_the_same_bytes(bench, scored) -> None:
    bench.add(*known_effects(scored))
    first, second = bench.run("toy_protocols", out="one"), bench.run("toy_protocols", out="two")
    for path in sorted((first / "tables").iterdir()):
        assert path.read_bytes() == (second / "tables" / path.name).read_bytes()
