"""Copies of frozen weights in autocast's type change no bit: not of a loss, a trained weight, an export or the base."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_ga.training
from lora_ga.adapters import target_linears
from lora_ga.data.encoding import EncodedRows
from lora_ga.losses import held_out_loss
from lora_ga.merging import merged
from lora_ga.methods.adalora import AdaLora
from lora_ga.methods.base import Setup
from lora_ga.methods.full_ft import FullFinetune
from lora_ga.methods.lora import Lora
from lora_ga.methods.lora_ga import LoraGA
from lora_ga.methods.pissa import Pissa
from lora_ga.optim.steps import LoraPro
from lora_ga.precast import precast
from lora_ga.training import Resume, TrainSettings, train

SETTINGS = TrainSettings(
    learning_rate=1e-2,
    global_batch_size=8,
    per_device_train_batch_size=4,
    warmup_ratio=0.2,
    autocast="bfloat16",
    held_out_every=2,
)
METHODS = {
    "lora": Lora(r=4),
    "lora_dropout": Lora(r=4, lora_dropout=0.2),
    "dora": Lora(r=4, use_dora=True),
    "lora_pro": Lora(r=4, steps=LoraPro()),
    "pissa": Pissa(r=4),
    "lora_ga": LoraGA(r=4),
    "adalora": AdaLora(r=2, init_r=4),
}


@pytest.fixture
def trained(tiny, targets, random_rows, collators, tmp_path):
    """trained(method, architecture, name): the model after four steps under autocast, its loss curve, its export, and
    how many layers had copies whenever the held-out loss was measured.
    """

    def run(method, architecture, name):
        model = tiny(architecture, dropout=0.1)

        def gradients(k):
            generator = torch.Generator().manual_seed(0)
            layers = target_linears(model, targets[architecture])
            return {name: torch.randn(layer.weight.shape, generator=generator) for name, layer in layers.items()}

        setup = Setup(targets[architecture], gradients, seed=0, total_steps=4, full_precision=False)
        model = method.prepare(model, setup)
        rows, collator, copied = random_rows(32), collators[architecture], []

        def held_out():
            copied.append(sum("forward" in vars(module) for module in model.modules()))
            return held_out_loss(model, rows[:8], collator, batch_size=4, autocast=torch.bfloat16)

        result, _ = train(
            model, EncodedRows(rows), collator, method, SETTINGS, seed=0, resume=Resume(tmp_path), held_out=held_out
        )
        method.export(model, tmp_path / name)
        return model, result, load_file(tmp_path / name / "adapter_model.safetensors"), copied

    return run


def base_linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name}


def curve(result):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.loss_curve]


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
@pytest.mark.parametrize("name", METHODS)
def test_training_is_the_same_bit_for_bit(trained, tiny, monkeypatch, name, architecture):
    model, result, export, copied = trained(METHODS[name], architecture, "with")
    monkeypatch.setattr(lora_ga.training, "precast", lambda model, dtype: nullcontext())
    plain, reference, expected, none = trained(METHODS[name], architecture, "without")
    assert min(copied) >= len(base_linears(tiny(architecture))) and none == [0, 0]
    assert len(result.loss_curve) == 4 and curve(result) == curve(reference)
    weights = plain.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for key, weight in model.state_dict().items():
        assert weight.dtype == weights[key].dtype and torch.equal(weight, weights[key]), key
    assert export.keys() == expected.keys()
    assert all(torch.equal(export[key], expected[key]) for key in export)


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
def test_what_comes_after_training_sees_the_weights_there_were(trained, tiny, architecture):
    model, *_ = trained(METHODS["lora"], architecture, "with")
    before = {name: p.clone() for name, p in tiny(architecture).named_parameters()}
    for name, parameter in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer.", ".")]), name
    with torch.no_grad(), merged(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
def test_products_use_the_copies_within_and_the_weights_afterwards(tiny, targets, architecture):
    """Seen by moving the weights underneath, which nobody else does."""
    model = Lora(r=4).prepare(tiny(architecture), Setup(targets[architecture], dict, seed=0, total_steps=1))
    linears = base_linears(model)
    assert len(linears) > 10
    inputs = {name: torch.randn(3, linear.in_features) for name, linear in linears.items()}

    def products():
        with torch.autocast("cpu", torch.bfloat16):
            return {name: linear(inputs[name]) for name, linear in linears.items()}

    before = products()
    with pytest.raises(KeyError), precast(model, torch.bfloat16):
        for linear in linears.values():
            linear.weight.add_(1)
        within = products()
        assert all(torch.equal(within[name], before[name]) for name in linears)
        for name, linear in linears.items():  # without autocast nothing is cast, nor copied
            assert torch.equal(linear(inputs[name]), nn.functional.linear(inputs[name], linear.weight))
        raise KeyError
    after = products()
    assert not any(torch.equal(after[name], before[name]) for name in linears)


@pytest.mark.parametrize(
    ("method", "dtype", "autocast"),
    [
        (FullFinetune(), torch.float32, torch.bfloat16),
        (Lora(r=4), torch.bfloat16, torch.bfloat16),
        (Lora(r=4), torch.float32, None),
    ],
    ids=["all weights train", "bfloat16 already", "no autocast"],
)
def test_nothing_is_copied_where_nothing_would_be_cast(tiny, targets, method, dtype, autocast):
    model = method.prepare(tiny("causal").to(dtype), Setup(targets["causal"], dict, seed=0, total_steps=1))
    with precast(model, autocast):
        assert not [name for name, linear in base_linears(model).items() if "forward" in vars(linear)]
