"""Compiled blocks train as plain ones do, with few graphs, and leave the model as it was."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ga import compilation
from lora_ga.compilation import blocks, check_compiler, compiled_blocks
from lora_ga.data.encoding import EncodedRows
from lora_ga.errors import SetupError
from lora_ga.losses import held_out_loss
from lora_ga.methods.adalora import AdaLora
from lora_ga.methods.base import Setup
from lora_ga.methods.full_ft import FullFinetune
from lora_ga.methods.lora import Lora
from lora_ga.optim.steps import AdamW
from lora_ga.training import Resume, TrainSettings, train

# Adam turns the rounding of a vanishing gradient into a whole step; its eps is raised above that.
METHODS = {
    "full_ft": FullFinetune(steps=AdamW(eps=1e-5)),
    "lora": Lora(r=4, steps=AdamW(eps=1e-5)),
    "dora": Lora(r=4, use_dora=True, steps=AdamW(eps=1e-5)),
    "adalora": AdaLora(r=2, init_r=4, steps=AdamW(eps=1e-5)),
}
CASES = [*((name, "causal") for name in METHODS), ("lora", "seq2seq")]
ROWS = 40


@pytest.fixture
def trained(tiny, targets, random_rows, collators, tmp_path):
    """trained(method, compile): losses, held-out ones too if asked for, and the model's state after five steps."""

    def run(method, architecture="causal", model=None, **settings):
        model, rows, collator = model or tiny(architecture, dropout=0.0), random_rows(ROWS), collators[architecture]
        model = method.prepare(model, Setup(targets[architecture], dict, 0, 5, settings.get("autocast") is None))
        chosen = TrainSettings(learning_rate=1e-2, global_batch_size=8, per_device_train_batch_size=4, **settings)

        def held_out():
            return held_out_loss(model, rows[:8], collator, batch_size=4, autocast=chosen.autocast_dtype)

        result, _ = train(
            model, EncodedRows(rows), collator, method, chosen, seed=0, resume=Resume(tmp_path), held_out=held_out
        )
        curve = [row[name] for row in result.loss_curve for name in ("loss", "held_out_loss") if name in row]
        return curve, model.state_dict()

    return run


@pytest.fixture
def traced(monkeypatch):
    """Graphs run as they were traced, which needs no compiler; counts them."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def assert_same(found, wanted, rtol):
    (curve, state), (wanted_curve, wanted_state) = found, wanted
    assert curve == pytest.approx(wanted_curve, rel=rtol)
    assert list(state) == list(wanted_state)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, wanted_state[name], rtol=rtol, atol=rtol, msg=name)


@pytest.mark.parametrize(("method", "architecture"), CASES)
def test_training_is_the_plain_one(trained, traced, method, architecture):
    found = trained(METHODS[method], architecture, compile=True)
    assert traced() > 0
    assert_same(found, trained(METHODS[method], architecture), 2e-4)


def test_autocast_casts_inside_the_graphs(trained, traced):
    found = trained(METHODS["lora"], compile=True, autocast="bfloat16")
    assert traced() > 0
    assert_same(found, trained(METHODS["lora"], autocast="bfloat16"), 2e-2)


def test_depth_and_lengths_share_graphs(tiny, trained, traced, random_rows):
    lengths = {len(row.prompt) + len(row.target) for row in random_rows(ROWS)}
    assert len(lengths) > 5
    config = LlamaConfig(**{**tiny().config.to_dict(), "num_hidden_layers": 6, "attn_implementation": "eager"})

    def once(**settings):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).requires_grad_(False)
        return trained(METHODS["lora"], model=model, held_out_every=2, **settings)

    found = once(compile=True)
    # The first block's input needs no gradient, the others' does; the held-out loss needs none anywhere.
    assert traced() == 3
    assert_same(found, once(), 2e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_inductor_trains_as_the_plain_path_does(trained):
    assert_same(trained(METHODS["lora"], compile=True), trained(METHODS["lora"]), 2e-4)


@pytest.mark.parametrize("architecture", ["causal", "seq2seq"])
def test_blocks_are_the_repeated_layers(tiny, architecture):
    model = tiny(architecture)
    kinds = {type(block).__name__ for block in blocks(model)}
    assert (kinds, len(blocks(model))) == (({"LlamaDecoderLayer"}, 2) if architecture == "causal" else ({"T5Block"}, 4))


def test_an_error_leaves_plain_blocks(tiny, traced):
    model = tiny()
    with pytest.raises(KeyError), compiled_blocks(model, wanted=True):
        assert all(block._compiled_call_impl for block in blocks(model))
        raise KeyError
    assert not any(block._compiled_call_impl for block in blocks(model))
    with compiled_blocks(model, wanted=False):
        assert not any(block._compiled_call_impl for block in blocks(model))


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SetupError, match="no-such-compiler: install g"):
        check_compiler("cpu")
    check_compiler("cuda")


def test_modules_without_blocks_stay_plain():
    model = nn.Sequential(nn.Linear(2, 2))
    with compiled_blocks(model, wanted=True):
        assert model(torch.ones(1, 2)).shape == (1, 2)
