"""Every method's trained model is one model, however it is used: with its adapters, merged, exported, or saved whole.

The methods are built from conf/ as a run builds them and really trained for a few steps on conf's llama_tiny.
Tolerances: float32 sums of another order (1e-5 of logits of size 1); bfloat16 weights round the merged sum (see there).
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_utils import PreTrainedModel

import lora_ga.models
from experiments.config import CONF, load_config
from lora_ga.adapters import OFFSET, TRAINED, adapter_pairs, keep_function, target_linears
from lora_ga.data.encoding import EncodedRows
from lora_ga.errors import SetupError
from lora_ga.gradients import estimate_gradients
from lora_ga.losses import mean_token_loss
from lora_ga.merging import merged, save_merged
from lora_ga.methods.adalora import ranks
from lora_ga.methods.base import Setup
from lora_ga.models import load_model
from lora_ga.training import Resume, TrainSettings, train

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
STEPS = 8
TOLERANCE = {"rtol": 0, "atol": 1e-5}
RATES = {"adalora": 0.1}  # its singular values start at zero and are divided by the rank: 5e-3 moves no logit by 0.01


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch):
    monkeypatch.setattr(lora_ga.models, "load_tokenizer", lambda spec: None)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0")


@pytest.fixture
def batch(random_rows, collators):
    return lambda architecture="causal", seed=3: collators[architecture](random_rows(5, seed))


def load(folder):
    """The checkpoint as its folder says, with the attention the trained model has."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")


@torch.no_grad()
def logits(model, batch):
    model.eval()
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()


@pytest.fixture(scope="module")
def trained(random_rows, collators, tmp_path_factory):
    """trained(name, full_precision, dtype): the method, a trained model of it, its untouched base; made once each."""
    made = {}

    def make(name, full_precision=True, dtype="float32"):
        key = (name, full_precision, dtype)
        if key not in made:
            config = load_config(
                ["model=llama_tiny", "model.config.vocab_size=64", f"model.dtype={dtype}", f"method={name}"]
            )
            base, untouched = load_model(config.model).model, load_model(config.model).model
            layers = target_linears(base, config.model.target_modules)
            batches = [collators["causal"](random_rows(4, seed)) for seed in (1, 2)]
            setup = Setup(
                target_modules=config.model.target_modules,
                gradients=lambda k: estimate_gradients(base, batches, layers, mean_token_loss, seed=0),
                seed=1,
                total_steps=STEPS,
                full_precision=full_precision,
            )
            model = config.method.prepare(base, setup)
            folder = tmp_path_factory.mktemp(name)
            settings = TrainSettings(
                learning_rate=RATES.get(name, 5e-3), global_batch_size=4, per_device_train_batch_size=4
            )
            rows = EncodedRows(random_rows(4 * STEPS, 7))
            train(model, rows, collators["causal"], config.method, settings, resume=Resume(folder), seed=0)
            made[key] = config.method, model, untouched
        return made[key]

    return make


def tensors(model):
    return {name: (tensor, tensor.detach().clone()) for name, tensor in model.named_parameters()}


def assert_untouched(model, before):
    now = dict(model.named_parameters())
    assert list(now) == list(before)
    for name, (parameter, value) in before.items():
        assert now[name] is parameter and torch.equal(parameter, value), name


CASES = [(name, precise) for name in METHODS for precise in (True, False)]


@pytest.mark.parametrize(("name", "full_precision"), CASES)
def test_merged_is_the_trained_model_and_gives_it_back(trained, batch, name, full_precision):
    _, model, untouched = trained(name, full_precision)
    expected, before = logits(model, batch()), tensors(model)
    assert (expected - logits(untouched, batch())).abs().max() > 0.5  # or there would be nothing to merge
    calls = []
    hooks = [
        module.register_forward_hook(lambda *_: calls.append(1))
        for part, module in model.named_modules()
        if part.rpartition(".")[2] in (TRAINED, OFFSET) and isinstance(module, nn.Linear)
    ]
    with merged(model) as whole:
        together = logits(whole, batch())
    for hook in hooks:
        hook.remove()
    assert not calls  # no adapter was computed
    torch.testing.assert_close(together, expected, **TOLERANCE)
    assert_untouched(model, before)
    assert torch.equal(logits(model, batch()), expected)


@pytest.mark.parametrize(("name", "full_precision"), CASES)
def test_the_export_and_the_checkpoint_are_the_trained_model(trained, batch, tokenizer, tmp_path, name, full_precision):
    method, model, untouched = trained(name, full_precision)
    expected, before = logits(model, batch()), tensors(model)
    save_merged(model, tokenizer, tmp_path / "whole")
    assert_untouched(model, before)
    whole = load(tmp_path / "whole")
    assert {type(module).__name__ for module in whole.modules()} == {
        type(module).__name__ for module in untouched.modules()
    }
    torch.testing.assert_close(logits(whole, batch()), expected, **TOLERANCE)
    with merged(model) as together:
        assert torch.equal(logits(together, batch()), logits(whole, batch()))

    method.export(model, tmp_path / "export")
    if name == "full_ft":
        reloaded = load(tmp_path / "export")
    else:
        reloaded = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "export")
    torch.testing.assert_close(logits(reloaded, batch()), expected, **TOLERANCE)
    with merged(reloaded):
        torch.testing.assert_close(logits(reloaded, batch()), expected, **TOLERANCE)


def test_the_trained_models_cover_what_merging_can_meet(trained):
    assert len(METHODS) >= 15
    scaling = {name: adapter_pairs(trained(name)[1])[0].scaling for name in ("lora", "rslora")}
    assert scaling == {"lora": 2.0, "rslora": pytest.approx(16 / 8**0.5)}
    for name in ("lora_ga", "pissa"):
        folded, apart = (adapter_pairs(trained(name, precise)[1])[0].layer for precise in (True, False))
        assert folded.active_adapters == [TRAINED] and apart.active_adapters == [TRAINED, OFFSET]
    used, full = ranks(trained("adalora")[1])
    assert used < full


def weights(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full_ft"])
def test_a_bf16_base_rounds_the_sum_once_and_can_be_merged_exactly(trained, tokenizer, tmp_path, name):
    """The checkpoint in float32 is the sum itself; the default one is that sum rounded to bfloat16."""
    _, model, untouched = trained(name, dtype="bfloat16")
    save_merged(model, tokenizer, tmp_path / "exact", dtype=torch.float32)
    save_merged(model, tokenizer, tmp_path / "rounded")
    exact, rounded = (load(tmp_path / kind) for kind in ("exact", "rounded"))
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    bf16 = {key: tensor.to(torch.bfloat16) for key, tensor in exact.state_dict().items()}
    assert all(torch.equal(tensor, bf16[key]) for key, tensor in rounded.state_dict().items())
    moved = [not torch.equal(tensor, bf16[key]) for key, tensor in untouched.state_dict().items()]
    assert sum(moved) == 14


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full_ft"])
def test_a_bf16_base_merged_in_float32_computes_the_trained_model(trained, batch, name, tokenizer, tmp_path):
    """Adapters apart in a float32 copy of the model against the float32 checkpoint: nothing but the order differs."""
    _, model, _ = trained(name, dtype="bfloat16")
    save_merged(model, tokenizer, tmp_path / "exact", dtype=torch.float32)
    whole, apart = load(tmp_path / "exact"), copy.deepcopy(model).float()
    # A random model is made in float32 and cast, which rounds its rotary frequencies; a loaded one has exact ones.
    apart.get_base_model().model.rotary_emb.inv_freq.copy_(whole.model.rotary_emb.inv_freq)
    expected = logits(apart, batch())
    torch.testing.assert_close(logits(whole, batch()), expected, **TOLERANCE)
    before = tensors(model)
    with merged(model):
        drift = (logits(model, batch()) - expected).abs().max()
    assert drift < 0.02 * expected.abs().max()  # eight bits of mantissa through two layers
    assert_untouched(model, before)


def test_full_finetuning_has_nothing_to_merge(trained, batch):
    _, model, _ = trained("full_ft")
    with merged(model) as whole:
        assert whole is model and isinstance(model, PreTrainedModel)


def test_an_error_within_gives_the_model_back(trained, batch):
    _, model, _ = trained("lora_ga", False)
    before, expected = tensors(model), logits(model, batch())
    with pytest.raises(KeyError), merged(model):
        raise KeyError
    assert_untouched(model, before)
    assert torch.equal(logits(model, batch()), expected)


def test_merged_within_merged_and_with_adapters_off(trained, batch):
    _, model, _ = trained("dora")
    before, expected = tensors(model), logits(model, batch())
    with merged(model):
        with merged(model):
            inner = logits(model, batch())
        assert torch.equal(logits(model, batch()), inner)
        with model.disable_adapter():  # PEFT unmerges the layers for it
            logits(model, batch())
    assert_untouched(model, before)
    assert torch.equal(logits(model, batch()), expected)


def test_a_quantised_weight_is_refused_and_nothing_is_changed(tiny, targets):
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=list(targets["causal"])))
    layer = adapter_pairs(model)[-1].layer
    layer.base_layer.weight = nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
    before = tensors(model)
    with pytest.raises(SetupError, match=r"torch\.int8 weight: load the base model in float32"), merged(model):
        pass
    assert_untouched(model, before)


@pytest.fixture
def with_adapters(tiny, targets):
    """A model with an offset and adapters that moved on from it, on either architecture."""

    def make(architecture="causal", modules=None):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=modules or list(targets[architecture]))
        model = get_peft_model(tiny(architecture, 0.0), config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for scale in (1.0, 0.1):
                for pair in adapter_pairs(model):
                    for factor in (pair.lora_A, pair.lora_B):
                        factor += scale * 0.2 * torch.randn(factor.shape, generator=generator)
                if scale == 1.0:
                    keep_function(model, full_precision=False)
        return model

    return make


def test_a_sequence_to_sequence_model_is_saved_whole(with_adapters, batch, tokenizer, tmp_path):
    model = with_adapters("seq2seq")
    save_merged(model, tokenizer, tmp_path / "whole")
    whole = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole")
    expected = logits(model, batch("seq2seq"))
    assert (expected - logits(model.get_base_model(), batch("seq2seq"))).abs().max() == 0
    torch.testing.assert_close(logits(whole, batch("seq2seq")), expected, rtol=0, atol=1e-3)
    assert whole.get_input_embeddings().weight is whole.get_output_embeddings().weight


def test_a_checkpoint_is_what_serving_needs(with_adapters, tokenizer, tmp_path):
    folder = tmp_path / "whole"
    folder.mkdir()
    save_merged(with_adapters(), tokenizer, folder)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("adapter" in name for name in names)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["use_cache"] is True
    assert AutoTokenizer.from_pretrained(folder)("w3").input_ids == tokenizer("w3").input_ids
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] is not None
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]  # nothing of the writing is left


def test_an_earlier_checkpoint_is_replaced_and_other_files_are_not(with_adapters, batch, tokenizer, tmp_path):
    model, folder = with_adapters(), tmp_path / "whole"
    save_merged(model, tokenizer, folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"of an earlier, larger model")
    with torch.no_grad():
        adapter_pairs(model)[0].lora_B.mul_(2)
    save_merged(model, tokenizer, folder)
    assert not (folder / "model-00002-of-00002.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    whole = load(folder)
    torch.testing.assert_close(logits(whole, batch()), logits(model, batch()), rtol=0, atol=1e-3)

    other = tmp_path / "notes"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(SetupError, match="holds other files than a checkpoint"):
        save_merged(model, tokenizer, other)
    assert (other / "letter.txt").read_text() == "mine"


def test_a_tied_output_layer_that_was_adapted_is_refused(tiny, tokenizer, tmp_path):
    base = tiny()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(SetupError, match="tied to the embeddings"):
        save_merged(model, tokenizer, tmp_path / "whole")
    embeddings = base.get_input_embeddings().weight.clone()
    with torch.no_grad():
        adapter_pairs(model)[-1].lora_B.add_(1)
    with merged(model):  # the embeddings do not move with the output layer
        assert torch.equal(base.get_input_embeddings().weight, embeddings)


def test_what_is_no_transformers_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(TypeError, match="not Linear"):
        save_merged(nn.Linear(2, 2), tokenizer, tmp_path / "whole")
