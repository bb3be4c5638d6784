"""The bench measures what it says, takes turns, and its peers compute the same as we do."""

from __future__ import annotations

import json
import math

import pytest
import torch

from experiments.bench import __main__ as bench
from experiments.bench import loops, measure, page, starts, steps
from experiments.bench.compare import Comparison, comparisons
from experiments.bench.measure import Measured
from experiments.stages import Gradients
from lora_ga.adapters import adapter_pairs
from lora_ga.errors import SetupError
from lora_ga.methods.base import Setup
from lora_ga.optim.lora_pro import LoraProAdamW

TINY = ["model=llama_tiny", "task=movies", "train.autocast=null", "task.sizes={train: 64, validation: 8, test: 8}"]


def test_memory_is_the_rise_of_the_peak_and_warm_rounds_are_not_timed():
    calls = []

    def work():
        calls.append(torch.ones(60_000_000))
        return calls.pop().numel()

    found = measure.measure(work, times=3, warm=2, facts=lambda numel: {"numel": float(numel)})
    assert 200 < found.extra_mb < 400  # 229 MB at a time
    assert found.seconds > 0 and found.facts == {"numel": 60e6}


def test_sides_take_turns_and_medians_are_of_each(monkeypatch, capsys, tmp_path):
    order, times = [], iter([1.0, 10.0, 3.0, 30.0, 2.0, 20.0])

    def child(comparison, side):
        order.append(side)
        return {"seconds": next(times), "extra_mb": 8.0 if side == "ours" else 32.0}

    sides = {"ours": lambda: Measured(0, 0), "theirs": lambda: Measured(0, 0)}
    monkeypatch.setattr(bench, "child", child)
    monkeypatch.setattr(bench, "comparisons", lambda: {"toy": Comparison("toys", sides, 3)})
    assert bench.main([f"out={tmp_path}"]) == 0
    assert order == ["ours", "theirs"] * 3
    found = json.loads((tmp_path / "toy.json").read_text())
    assert {side: median["seconds"] for side, median in found["medians"].items()} == {"ours": 2.0, "theirs": 20.0}
    assert "| theirs | 20 | 10.00 | 32 | 4.00 |" in capsys.readouterr().out
    text = (tmp_path / "README.md").read_text()
    assert "toys; median of 3." in text and "| ours | 2 | 1.00 | 8 | 1.00 |" in text
    assert f"{found['threads']} threads" in text


def test_a_comparison_that_fails_stops_no_other(monkeypatch, tmp_path, caplog):
    sides = {"ours": lambda: Measured(0, 0), "theirs": lambda: Measured(0, 0)}

    def child(comparison, side):
        if comparison == "broken":
            raise RuntimeError("broken, ours: out of memory")
        return {"seconds": 1.0, "extra_mb": 1.0}

    monkeypatch.setattr(bench, "child", child)
    monkeypatch.setattr(bench, "comparisons", lambda: {name: Comparison(name, sides, 1) for name in ("broken", "toy")})
    assert bench.main([f"out={tmp_path}"]) == 1
    assert "out of memory" in caplog.text
    assert [path.name for path in tmp_path.glob("*.json")] == ["toy.json"]


def test_every_headline_names_sides_that_are_there():
    known = comparisons()
    for name, rows in page.HEADLINES.items():
        assert {side for row in rows for side in row} <= known[name].sides.keys()


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [(["only=nothing"], "only=nothing is no comparison"), (["repeats=x"], "repeats=x"), (["more=1"], "'more=1'")],
)
def test_a_wrong_setting_is_one_line(arguments, mentions, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2 and mentions in capsys.readouterr().err


def test_elsewhere_than_on_linux_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "Path", lambda _: tmp_path / "missing")
    with pytest.raises(SetupError, match="run it on Linux"):
        measure.require_linux()


def test_no_ratio_where_ours_takes_nothing():
    found = {"what": "x", "repeats": 1, "medians": {"ours": {"seconds": 0.5, "extra_mb": 0.0}}}
    assert page.rows(found)[1] == [["ours", "0.5", "1.00", "0", "-"]]


def test_every_comparison_begins_with_ours_and_names_no_side_twice():
    for name, comparison in comparisons().items():
        assert len(comparison.sides) > 1 and comparison.repeats > 0, name
        assert next(iter(comparison.sides)).split(",")[0].split()[0] in ("ours", "incremental", "batches"), name


def test_the_step_a_layer_at_a_time_is_ours():
    layers = [(24, 32), (24, 32), (16, 40)]
    mine, theirs = steps.pairs(layers, 4), steps.pairs(layers, 4)
    ours, peer = LoraProAdamW(mine, lr=steps.RATE), steps.PerLayerLoraPro(theirs)
    for _ in range(3):
        ours.step()
        peer.step()
    for (A, B, _), (other_A, other_B, _) in zip(mine, theirs, strict=True):
        torch.testing.assert_close(A, other_A, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(B, other_B, rtol=1e-3, atol=1e-5)


def test_steps_can_be_measured():
    layers = [(32, 64)] * 2
    for side in (steps.adamw, steps.adamw_and_grams, steps.scaled, steps.riemannian, steps.multiplications):
        assert side(layers, 4).seconds > 0
    assert steps.floor(layers).seconds > 0


def _spaces(model):
    return {pair.name: (pair.lora_A.mT @ pair.lora_A, pair.lora_B @ pair.lora_B.mT) for pair in adapter_pairs(model)}


def test_the_plain_start_and_pefts_gradients_are_ours():
    """In float32, from the same rows; the spaces of the factors, as singular vectors have no sign."""
    config, gradients = starts.case(TINY)
    setup = Setup(config.model.target_modules, gradients, 0, 1, True)
    ours = _spaces(config.method.prepare(gradients.loaded.model, setup))
    config, gradients = starts.case(TINY)
    plain = _spaces(starts._plain_start(config, config.method, gradients.loaded, gradients.batches()[0]))
    assert ours.keys() == plain.keys()
    for name, spaces in ours.items():
        for mine, other in zip(spaces, plain[name], strict=True):
            torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05 * float(mine.abs().max()))


def test_starts_and_what_they_keep_can_be_measured():
    assert starts.peft(TINY).seconds > 0
    assert starts.passes_alone(TINY).seconds > 0
    assert starts.multiplications(TINY).seconds > 0
    found = starts.kept_energy(TINY, ["train.gradient.mode=incremental"])
    assert 0.9 < found.facts["least_share"] <= found.facts["median_share"] <= 1 + 1e-6
    assert 0 <= found.facts["median_largest_angle"] < 90


def test_parts_of_a_batch_have_the_batchs_gradient():
    """train.gradient.rows_at_once changes memory, not the gradient."""
    _, whole = starts.case(TINY)
    parts = starts.case([*TINY, "train.gradient.rows_at_once=3"])[1]
    assert len(parts.batches()[0]) == 3 * len(whole.batches()[0])
    assert math.isclose(sum(parts.batches()[1]), 1, rel_tol=1e-6)
    assert isinstance(whole, Gradients)
    wanted, found = whole(8), parts(8)
    for name, G in wanted.items():
        torch.testing.assert_close(found[name], G, rtol=1e-3, atol=1e-5 * float(G.abs().max()))


@pytest.mark.slow
def test_loops_read_the_same_tokens_and_lose_about_the_same():
    found = [
        loops.ours(TINY),
        loops.stock(TINY, fixed=True),
        loops.stock(TINY, fixed=False),
    ]
    for one in found:
        assert one.facts["tokens_per_second"] > 0
        assert one.facts["last_loss"] == pytest.approx(found[0].facts["last_loss"], abs=0.3)


def test_every_curve_is_of_two_ways():
    for name, comparison in comparisons().items():
        if name.startswith("scaling-"):
            sides = [side.rpartition(" ") for side in comparison.sides]
            assert [at for _, _, at in sides[::2]] == [at for _, _, at in sides[1::2]], name
            assert len({way for way, _, _ in sides[::2]}) == len({way for way, _, _ in sides[1::2]}) == 1, name


def test_a_curve_sets_both_ways_side_by_side():
    medians = {
        f"{way} rank={r}": {"seconds": seconds * r, "extra_mb": 100.0 * r}
        for r in (4, 16)
        for way, seconds in (("ours", 1.0), ("a plain one", 3.0))
    }
    table = page.lines("scaling-rank", {"what": "w", "repeats": 1, "medians": medians})
    assert "| rank=16 | 16 | 48 | 3.00 | 1600 | 1600 | 1.00 |" in table
    assert [line for line in table if "a plain one, seconds" in line]
