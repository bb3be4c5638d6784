"""Every method file of conf/ keeps the contract: its promise at step 0, what trains, a step that moves, early refusals.

The methods are built from conf/ as a run builds them; the model is conf's llama_tiny with a small vocabulary.
"""

from __future__ import annotations

import re

import pytest
import torch

import experiments.run
import lora_ga.models
from experiments.config import CONF, load_config
from lora_ga.adapters import TRAINED, adapter_pairs, target_linears
from lora_ga.errors import SetupError
from lora_ga.gradients import estimate_gradients
from lora_ga.losses import mean_token_loss, scored_logits
from lora_ga.methods.base import Setup
from lora_ga.models import load_model, target_shapes
from lora_ga.optim.lora_pro import LoraProAdamW
from lora_ga.training import check_start

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
COMPOSED = ["method=lora_one method/steps=lora_pro", "method=lora_ga method/steps=lora_plus"]
CASES = [f"method={name}" for name in METHODS] + COMPOSED
SHIFTS = {"method=lora_one", "method=lora_one_prec", "method=lora_one_pro", COMPOSED[0]}
SMALL = ["model=llama_tiny", "model.config.vocab_size=64"]


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch):
    monkeypatch.setattr(lora_ga.models, "load_tokenizer", lambda spec: None)


@pytest.fixture
def prepared(random_rows, collators):
    """prepared("method=lora", ...): method, model before it, prepared model, and a batch."""

    def make(*overrides, full_precision=True):
        config = load_config([*SMALL, *overrides])
        config.method.check(target_shapes(config.model))
        base, untouched = load_model(config.model).model, load_model(config.model).model
        batches = [collators["causal"](random_rows(4, seed)) for seed in (1, 2)]
        layers = target_linears(base, config.model.target_modules)
        setup = Setup(
            target_modules=config.model.target_modules,
            gradients=lambda k: estimate_gradients(base, batches, layers, mean_token_loss, seed=0),
            seed=config.seeds.adapter,
            total_steps=10,
            full_precision=full_precision,
        )
        return config.method, untouched, config.method.prepare(base, setup), batches[0]

    return make


def suffixes(model):
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {match[1] if (match := re.search(r"\.(lora_\w+)\.default", name)) else name for name in names}


def test_every_method_file_is_here():
    assert len(METHODS) >= 15
    published = {
        "full_ft",
        "lora",
        "rslora",
        "lora_plus",
        "dora",
        "pissa",
        "adalora",
        "lora_ga",
        "lora_one",
        "lora_pro",
    }
    assert published <= set(METHODS)


@pytest.mark.parametrize("full_precision", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_keeps_its_promise_at_step_0(prepared, case, full_precision):
    method, untouched, model, batch = prepared(*case.split(), full_precision=full_precision)
    with torch.no_grad():
        before, after = (scored_logits(m.eval(), batch)[0] for m in (untouched, model))
    report = check_start(method, before, after)
    assert report["promise"] == ("shift" if case in SHIFTS else "identity")


@pytest.mark.parametrize("case", CASES)
def test_trains_what_it_should_and_nothing_else(prepared, case):
    _, untouched, model, _ = prepared(*case.split())
    if case == "method=full_ft":
        assert all(parameter.requires_grad for parameter in model.parameters())
        return
    extra = {"method=dora": {"lora_magnitude_vector"}, "method=adalora": {"lora_E"}}.get(case, set())
    assert suffixes(model) == {"lora_A", "lora_B"} | extra
    adapted = {name for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name}
    assert len(adapted) == len(target_linears(untouched, tuple(load_config(SMALL).model.target_modules)))


@pytest.mark.parametrize("case", CASES)
def test_one_step_moves_the_trainable_parameters_only(prepared, case):
    method, _, model, batch = prepared(*case.split())
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = method.optimizer(model, learning_rate=1e-3, weight_decay=0.0)
    loss = mean_token_loss(model, batch)
    loss.backward()
    optimizer.step()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    assert moved <= trainable
    # Where lora_B starts at zero lora_A has no gradient yet; AdaLoRA's singular values play lora_B's part.
    leading = "lora_E" if case == "method=adalora" else "lora_B"
    must = {name for name in trainable if leading in name} or trainable
    assert must and must <= moved
    assert mean_token_loss(model, batch) < loss


@pytest.mark.parametrize("case", ["method=lora_one method/steps=lora_pro", "method=lora_one_pro"])
def test_a_start_and_steps_of_two_papers_compose(prepared, case):
    composed, _, model, _ = prepared(*case.split())
    _, _, plain, _ = prepared("method=lora_one")
    for one, other in zip(adapter_pairs(model), adapter_pairs(plain), strict=True):
        assert torch.equal(one.lora_A, other.lora_A) and torch.equal(one.lora_B, other.lora_B)
    optimizer = composed.optimizer(model, learning_rate=1e-3, weight_decay=0.0)
    assert isinstance(optimizer, LoraProAdamW)


def test_the_seed_makes_the_start(prepared):
    def first(*overrides):
        return adapter_pairs(prepared(*overrides)[2])[0].lora_A.detach()

    assert torch.equal(first("method=lora"), first("method=lora"))
    assert not torch.equal(first("method=lora"), first("method=lora", "seeds.adapter=1"))
    assert torch.equal(first("method=lora"), first("method=lora", "seeds.data=1"))


@pytest.fixture
def loads_nothing(monkeypatch, tmp_path):
    """refused(overrides): run() must raise SetupError before it asks for weights or rows."""

    def never(*args, **kwargs):
        raise AssertionError("asked for weights or rows")

    monkeypatch.setattr(experiments.run, "load_model", never)
    monkeypatch.setattr(experiments.run.Rows, "load", never)
    places = [f"records={tmp_path}/records", f"outputs={tmp_path}/outputs"]

    def refused(*overrides):
        with pytest.raises(SetupError) as caught:
            experiments.run.run(load_config([*SMALL, *places, *overrides]))
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())
        return str(caught.value)

    return refused


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full_ft"])
def test_a_rank_that_does_not_fit_is_refused_by_layer(loads_nothing, name):
    key = "method.init_r" if name == "adalora" else "method.r"
    message = loads_nothing(f"method={name}", f"{key}=1000")
    assert "model.layers.0.self_attn.k_proj" in message and "32 x 64" in message


@pytest.mark.parametrize(("name", "key"), [("lora", "r"), ("lora_ga", "r"), ("adalora", "init_r")])
def test_the_limit_it_names_is_accepted_and_one_more_is_not(loads_nothing, name, key):
    limit = int(re.search(rf"use {key} <= (\d+)", loads_nothing(f"method={name}", f"method.{key}=1000"))[1])
    config = load_config([*SMALL, f"method={name}", f"method.{key}={limit}"])
    config.method.check(target_shapes(config.model))
    loads_nothing(f"method={name}", f"method.{key}={limit + 1}")


@pytest.mark.parametrize("steps", ["lora_pro", "scaled"])
@pytest.mark.parametrize("name", ["full_ft", "dora", "adalora"])
def test_matrix_steps_are_refused_where_they_cannot_move_everything(loads_nothing, name, steps):
    message = loads_nothing(f"method={name}", f"method/steps={steps}")
    assert "method/steps=adamw" in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lora", "method.r=0"],
        ["method=adalora", "method.init_r=8"],
        ["method=adalora", "method.tinit=0.7", "method.tfinal=0.4"],
        ["method=adalora", "method.use_rslora=true"],
        ["method=lora_ga", "method.direction=sideways"],
        ["method=lora_ga", "method.scale=huge"],
        ["method=lora_pro", "method.steps.mode=half"],
        ["method=lora_pro", "method.steps.X=guess"],
        ["method=lora", "model.target_modules=[q_proj,nothing]"],
    ],
    ids=" ".join,
)
def test_settings_no_method_can_follow_are_refused(loads_nothing, overrides):
    assert loads_nothing(*overrides)


def test_no_adapter_name_but_the_trained_one(prepared):
    assert list(prepared("method=lora")[2].peft_config) == [TRAINED]
