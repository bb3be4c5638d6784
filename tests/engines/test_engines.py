"""Two real processes under DDP and DeepSpeed train what one process trains: losses, starts, steps, saved adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lora_ga.engines import Engine
from lora_ga.training import Resume
from tests.engines.training_worker import METHODS, of
from tests.oracles.lora_pro_dense import DensePro

pytestmark = pytest.mark.slow

ENGINES = {"ddp": ("ddp", 0), "zero0": ("deepspeed", 0), "zero2": ("deepspeed", 2), "zero3": ("deepspeed", 3)}
ON_T5 = ("full_ft", "lora", "lora_ga", "lora_one", "lora_pro")
ON_LLAMA = [name for name in METHODS if name not in ("dora", "adalora")]  # DeepSpeed refuses them, in part
TRAININGS = [*(f"causal {name}" for name in ON_LLAMA), *(f"seq2seq {name}" for name in ON_T5)]
DORA = "causal dora"
SOME_REFUSE = {"ddp": (DORA, "causal adalora"), "zero0": (DORA,), "zero2": (DORA,), "zero3": ()}
WITH_AUTOCAST = "causal lora bfloat16"
FACTORED = ["causal lora_ga sketch", "causal lora_ga incremental", "causal lora_one incremental"]
# float32: sums in another order, over 4 steps; Adam divides by small second moments
LOSS, FACTOR = 2e-5, 2e-3


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Every training in one process."""
    folder = tmp_path_factory.mktemp("alone")
    wanted = [*TRAININGS, *SOME_REFUSE["ddp"], WITH_AUTOCAST, *FACTORED]
    return {which: of(which, Engine(), Resume(folder)) for which in wanted}


@pytest.fixture(scope="session", params=ENGINES)
def together(request, processes, tmp_path_factory):
    """(engine, what rank 0 found, what rank 1 found) of every training on two ranks."""
    folder = tmp_path_factory.mktemp(request.param)
    kind, stage = ENGINES[request.param]
    worker = Path(__file__).with_name("training_worker.py")
    wanted = [*TRAININGS, *SOME_REFUSE[request.param], WITH_AUTOCAST, *FACTORED]
    processes(2, worker, [kind, str(stage), str(folder), *wanted], folder)
    return request.param, *(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1))


def losses(found):
    return [row["loss"] for row in found["curve"]]


def test_losses_are_those_of_one_process(alone, together):
    name, first, second = together
    for which in (*TRAININGS, *SOME_REFUSE[name]):
        assert losses(first[which]) == losses(second[which])
        assert losses(first[which]) == pytest.approx(losses(alone[which]), abs=LOSS), which
        assert [row["tokens"] for row in first[which]["curve"]] == [row["tokens"] for row in alone[which]["curve"]]
        norms = [[row["grad_norm"] for row in found["curve"]] for found in (first[which], alone[which])]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3), which


def test_steps_are_measured_as_by_one_process(alone, together):
    """Before every parameter moves and after, whenever the engine moves it, against the gradient of all ranks."""
    _, first, second = together
    for which in TRAININGS:
        rows, others, ones = ([r for r in f[which]["curve"] if "captured" in r] for f in (first, second, alone))
        assert [row["step"] for row in rows] == [1, 2, 4]
        for name in ("alignment", "captured"):
            assert [row[name] for row in rows] == [row[name] for row in others]
            assert [row[name] for row in rows] == pytest.approx([row[name] for row in ones], rel=5e-3), (which, name)


def test_autocast_is_in_force_under_the_engine(alone, together):
    _, first, _ = together
    assert losses(first[WITH_AUTOCAST]) == pytest.approx(losses(alone[WITH_AUTOCAST]), abs=5e-3)
    off = np.abs(np.array(losses(alone[WITH_AUTOCAST])) - np.array(losses(alone["causal lora"]))).max()
    seen = np.abs(np.array(losses(first[WITH_AUTOCAST])) - np.array(losses(first["causal lora"]))).max()
    assert seen > off / 4 > 0  # bfloat16 shows in the losses


def test_starts_are_those_of_one_process(alone, together):
    _, first, second = together
    for which in TRAININGS:
        for name, factors in alone[which]["start"].items():
            ranks = first[which]["start"][name], second[which]["start"][name]
            for one, mine, others in zip(factors, *ranks, strict=True):
                assert torch.equal(mine, others)
                torch.testing.assert_close(mine, one, rtol=1e-3, atol=1e-5)


def test_factors_of_the_gradient_are_put_together_from_all_ranks(alone, together):
    """A sketch adds up; merged factors are another approximation on two ranks, of the same gradient."""
    _, first, second = together
    for which in FACTORED:
        for name, (A, B) in first[which]["start"].items():
            others = second[which]["start"][name]
            assert torch.equal(A, others[0]) and torch.equal(B, others[1])
            for mine, one in zip(
                (A, B.mT), (alone[which]["start"][name][0], alone[which]["start"][name][1].mT), strict=True
            ):
                overlap = torch.linalg.matrix_norm(mine @ one.mT) / torch.linalg.matrix_norm(mine @ mine.mT)
                assert overlap > (0.999 if which.endswith("sketch") else 0.9), (which, name)
        assert losses(first[which]) == losses(second[which])


def test_everything_trained_is_whole_and_equal(alone, together):
    _, first, second = together
    for which in TRAININGS:
        assert first[which]["shapes"] == second[which]["shapes"]
        assert set(first[which]["weights"]) == set(alone[which]["weights"])
        for name, one in alone[which]["weights"].items():
            mine = first[which]["weights"][name]
            assert torch.equal(mine, second[which]["weights"][name])
            assert torch.linalg.norm(mine - one) <= FACTOR * torch.linalg.norm(one) + 1e-6, (which, name)


def test_lora_pro_steps_are_the_dense_formulas(together):
    _, first, _ = together
    found = first["causal lora_pro"]
    assert len(found["handed"]) == 4
    for index, (name, (A, B)) in enumerate(found["start"].items()):
        dense = DensePro(A.double().numpy(), B.double().numpy(), found["scaling"][index], 0.0, "full", "sylvester")
        norms = [sum(float((g**2).sum()) for _, *pair in step for g in pair) ** 0.5 for step in found["handed"]]
        for step, norm in zip(found["handed"], norms, strict=True):
            dense.lr, G_A, G_B = step[index]
            assert norm <= 0.05 * (1 + 1e-4)  # what it is handed is clipped already
            dense.step(G_A.double().numpy(), G_B.double().numpy())
        for mine, oracle in zip(found["end"][name], (dense.A, dense.B), strict=True):
            np.testing.assert_allclose(mine.numpy(), oracle, rtol=1e-3, atol=1e-5)


def test_lora_pro_moments_are_shared_out(alone, together):
    _, first, second = together
    total = alone["causal lora_pro"]["optimizer_state_mb"]
    parts = [found["causal lora_pro"]["optimizer_state_mb"] for found in (first, second)]
    assert sum(parts) == pytest.approx(total, rel=0.02)
    assert max(parts) < 0.6 * total


def test_the_record_names_the_engine(together):
    name, first, _ = together
    kind, stage = ENGINES[name]
    for which in TRAININGS:
        engine = first[which]["engine"]
        assert (engine["kind"], engine["stage"], engine["world_size"]) == (kind, stage, 2)
        assert engine["micro_batch"] * engine["accumulation"] * 2 == 8
    assert first["causal lora_pro"]["engine"]["optimizer"] == "LoraProAdamW"
    rates = first["causal lora_plus"]["engine"]["learning_rates"]
    assert len(rates) > 1 and max(rates) == pytest.approx(16 * min(rates))
