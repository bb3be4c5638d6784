"""Adapters start where they should, keep the function while they do, and leave as plain PEFT adapters.

The promise to a user: what `export` writes, loaded by PEFT on the untouched base, is the trained model.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel

from lora_ga.adapters import (
    OFFSET,
    TRAINED,
    adapter_pairs,
    attach_lora,
    has_offset,
    keep_function,
    set_factors,
    target_linears,
)
from lora_ga.data.encoding import EncodedRows
from lora_ga.errors import SetupError
from lora_ga.gradients import estimate_gradients
from lora_ga.losses import mean_token_loss
from lora_ga.methods.adalora import AdaLora, ranks
from lora_ga.methods.base import Setup
from lora_ga.methods.lora import Lora
from lora_ga.methods.lora_ga import LoraGA
from lora_ga.methods.lora_one import LoraOne
from lora_ga.methods.pissa import Pissa
from lora_ga.training import Resume, TrainSettings, train

ARCHITECTURES = ["causal", "seq2seq"]
FAMILY = {
    "lora": Lora(r=4),
    "rslora": Lora(r=4, use_rslora=True),
    "dora": Lora(r=4, use_dora=True),
    "pissa": Pissa(r=4),
    "lora_ga": LoraGA(r=4),
    "lora_one": LoraOne(r=4),
}


@pytest.fixture
def batch(random_rows, collators):
    return lambda architecture, seed=3: collators[architecture](random_rows(5, seed))


@torch.no_grad()
def logits(model, batch):
    model.eval()
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()


def setup_for(model, targets, batches, full_precision=True):
    def gradients(k):
        layers = target_linears(model, targets)
        return estimate_gradients(model, batches, layers, mean_token_loss, seed=0, dropout=False)

    return Setup(target_modules=targets, gradients=gradients, seed=1, total_steps=10, full_precision=full_precision)


def config(targets, **options):
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **options)


def with_random_factors(model, scale=0.2):
    generator = torch.Generator().manual_seed(5)
    for pair in adapter_pairs(model):
        A = scale * torch.randn(pair.lora_A.shape, generator=generator)
        B = scale * torch.randn(pair.lora_B.shape, generator=generator)
        set_factors(pair, A, B)


def trainable_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def perturb(model, seed=7):
    """Stands for training: every trainable tensor moves a little, three times."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_target_linears_finds_each_layer_once_in_model_order(tiny, targets, architecture):
    model = tiny(architecture)
    found = target_linears(model, targets[architecture])
    expected = {"causal": 2 * 7, "seq2seq": 2 * 6 + 2 * 10}[architecture]
    assert len(found) == expected
    assert list(found) == [name for name, _ in model.named_modules() if name in found]
    assert all(model.get_submodule(name) is layer for name, layer in found.items())
    assert not any("lm_head" in name for name in found)


def test_target_linears_takes_a_whole_name_and_not_a_part_of_it(tiny):
    assert all(name.endswith(".q_proj") for name in target_linears(tiny(), ("q_proj",)))
    with pytest.raises(SetupError, match=r"\['proj'\].*q_proj"):
        target_linears(tiny(), ("q_proj", "proj"))


def test_an_embedding_is_no_linear_target(tiny):
    with pytest.raises(SetupError, match="embed_tokens"):
        target_linears(tiny(), ("embed_tokens",))


def test_attach_lora_depends_on_its_seed_alone_and_leaves_the_global_generator(tiny, targets):
    starts = []
    for seed, disturbance in ((3, 11), (3, 12), (4, 11)):
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        model = attach_lora(tiny(), config(targets["causal"]), seed)
        assert torch.equal(before, torch.get_rng_state())
        starts.append([pair.lora_A.detach().clone() for pair in adapter_pairs(model)])
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))


def test_pairs_carry_the_names_of_the_untouched_model(tiny, targets):
    expected = list(target_linears(tiny(), targets["causal"]))
    model = attach_lora(tiny(), config(targets["causal"]), 0)
    assert [pair.name for pair in adapter_pairs(model)] == expected
    assert adapter_pairs(tiny()) == []


def test_set_factors_starts_the_pair_there(tiny, targets, batch):
    model = attach_lora(tiny(), config(targets["causal"]), 0)
    pair = adapter_pairs(model)[0]
    A, B = torch.randn(pair.lora_A.shape), torch.randn(pair.lora_B.shape)
    set_factors(pair, A, B)
    assert torch.equal(pair.lora_A, A) and torch.equal(pair.lora_B, B)
    dense = tiny()
    with torch.no_grad():
        dense.get_submodule(pair.name).weight += pair.scaling * B @ A
    torch.testing.assert_close(logits(model, batch("causal")), logits(dense, batch("causal")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("full_precision", [True, False])
def test_keep_function_leaves_the_logits(tiny, targets, batch, architecture, full_precision):
    base = tiny(architecture)
    untouched = copy.deepcopy(base)
    before = logits(base, batch(architecture))
    model = attach_lora(base, config(targets[architecture]), 0)
    with_random_factors(model)
    shifted = logits(model, batch(architecture))
    assert (shifted - before).abs().max() > 0.1 * before.abs().max()  # or there would be nothing to keep
    assert not has_offset(model)

    keep_function(model, full_precision=full_precision)

    torch.testing.assert_close(logits(model, batch(architecture)), before, rtol=1e-4, atol=1e-4)
    assert has_offset(model)
    assert trainable_names(model) == {
        name for name, _ in model.named_parameters() if ".lora_A.default." in name or ".lora_B.default." in name
    }
    for pair in adapter_pairs(model):
        same = torch.equal(pair.base.weight, untouched.get_submodule(pair.name).weight)
        assert same is not full_precision  # folded into the weight, or the weight is as it was
        assert pair.layer.active_adapters == ([TRAINED] if full_precision else [TRAINED, OFFSET])


def test_a_bf16_base_is_never_folded(tiny, targets, batch):
    base = tiny().to(torch.bfloat16)
    untouched = copy.deepcopy(base)
    before = logits(base, batch("causal"))
    model = attach_lora(base, config(targets["causal"]), 0)
    with_random_factors(model)
    keep_function(model, full_precision=True)
    for pair in adapter_pairs(model):
        assert torch.equal(pair.base.weight, untouched.get_submodule(pair.name).weight)
        assert pair.layer.active_adapters == [TRAINED, OFFSET]
    drift = (logits(model, batch("causal")) - before).abs().max()
    assert drift < 0.05 * before.abs().max()


def exported(method, model, base, folder, batches):
    """Logits of the trained model, of its export on the untouched base, and of that one merged."""
    method.export(model, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing or unexpected key is only a warning to PEFT
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # PEFT looks AdaLoRA's ranks up by layer and stores them by tensor; its loader finds them all the same.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        loaded = PeftModel.from_pretrained(base, folder)
    apart = logits(loaded, batches)
    return logits(model, batches), apart, logits(loaded.merge_and_unload(), batches)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("full_precision", [True, False])
@pytest.mark.parametrize("name", FAMILY)
def test_the_export_is_the_trained_model_for_any_peft_user(
    tiny, targets, batch, tmp_path, architecture, full_precision, name
):
    method, base = FAMILY[name], tiny(architecture)
    setup = setup_for(base, targets[architecture], [batch(architecture, seed) for seed in (1, 2)], full_precision)
    model = method.prepare(base, setup)
    started = logits(model, batch(architecture))
    perturb(model)
    trained, apart, merged = exported(method, model, tiny(architecture), tmp_path, batch(architecture))
    assert (trained - started).abs().max() > 1e-2
    assert (trained - logits(tiny(architecture), batch(architecture))).abs().max() > 1e-2
    torch.testing.assert_close(apart, trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adalora_exports_its_cut_ranks(tiny, targets, random_rows, collators, batch, tmp_path, architecture):
    method, settings = AdaLora(r=2, init_r=4), {"global_batch_size": 4, "per_device_train_batch_size": 4}
    model = method.prepare(tiny(architecture), setup_for(None, targets[architecture], []))
    rows = EncodedRows(random_rows(40))
    train(
        model,
        rows,
        collators[architecture],
        method,
        TrainSettings(learning_rate=1e-2, **settings),
        resume=Resume(tmp_path / "out"),
        seed=0,
    )
    used, full = ranks(model)
    assert used < full
    trained, apart, merged = exported(method, model, tiny(architecture), tmp_path / "adapter", batch(architecture))
    assert (trained - logits(tiny(architecture), batch(architecture))).abs().max() > 1e-2
    torch.testing.assert_close(apart, trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=2e-4)


def test_a_training_goes_on_from_an_export(tiny, targets, batch, tmp_path):
    """The doubled adapter of a LoRA-GA run is an ordinary one: it can be trained further and its rank is 2r."""
    base = tiny()
    method = LoraGA(r=4)
    model = method.prepare(base, setup_for(base, targets["causal"], [batch("causal", 1)]))
    perturb(model)
    method.export(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    assert {pair.lora_A.shape[0] for pair in adapter_pairs(loaded)} == {8}
    assert {pair.scaling for pair in adapter_pairs(loaded)} == {1.0}
    assert all(".lora_" in name for name in trainable_names(loaded)) and trainable_names(loaded)


def test_export_refuses_a_model_without_adapters(tiny, tmp_path):
    with pytest.raises(TypeError, match="Lora exports a PEFT model"):
        Lora().export(tiny(), tmp_path)
