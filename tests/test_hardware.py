"""The rule of `auto` is a table; what it chose is in the configuration, so in the id and in the record."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import experiments.config
from experiments.config import load_config, require_means
from lora_ga.data.encoding import Collator
from lora_ga.errors import SetupError
from lora_ga.hardware import Choice, choose, has_bf16
from lora_ga.losses import mean_token_loss
from lora_ga.models import load_model

AUTO = ["model.attn_implementation=auto", "train.autocast=auto"]


@pytest.mark.parametrize(
    ("device", "bf16", "length", "expected"),
    [
        ("cpu", True, 128, Choice("eager", "bfloat16")),
        ("cpu", True, 512, Choice("eager", "bfloat16")),
        ("cpu", True, 1024, Choice("sdpa", "bfloat16")),
        ("cpu", False, 128, Choice("sdpa", None)),
        ("cuda", True, 128, Choice("sdpa", "bfloat16")),
        ("cuda", True, 4096, Choice("sdpa", "bfloat16")),
        ("cuda", False, 1024, Choice("sdpa", None)),
        ("mps", True, 128, Choice("sdpa", None)),
        ("mps", False, 128, Choice("sdpa", None)),
    ],
)
def test_the_rule(device, bf16, length, expected):
    assert choose(device, bf16=bf16, length=length) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True)])
def test_gpus_have_bfloat16_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_bf16(torch.device("cuda", 0)) is expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({}, False),
    ],
)
def test_cpus_have_bfloat16_by_their_instructions(monkeypatch, found, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert has_bf16(torch.device("cpu")) is expected


# In a configuration


@pytest.fixture
def machine(monkeypatch):
    """machine(device type, whether it has bfloat16): where configurations are read from now on."""

    def set_to(kind, bf16):
        monkeypatch.setattr(experiments.config, "device", lambda: SimpleNamespace(type=kind))
        monkeypatch.setattr(experiments.config, "has_bf16", lambda device: bf16)

    return set_to


def test_the_choice_is_in_the_configuration_that_is_hashed_and_recorded(machine):
    machine("cpu", True)
    chosen = load_config(AUTO)
    assert (chosen.model.attn_implementation, chosen.train.autocast) == ("eager", "bfloat16")
    assert chosen.resolved == load_config([]).resolved  # local scale's values, written out
    assert chosen.run_id == load_config([]).run_id
    assert load_config([*AUTO, "task.max_length=1024"]).model.attn_implementation == "sdpa"


def test_a_machine_that_chooses_otherwise_has_other_runs(machine):
    machine("cpu", False)
    slow = load_config(AUTO)
    assert slow.resolved["model"]["attn_implementation"] == "sdpa" and slow.resolved["train"]["autocast"] is None
    explicit = load_config(["model.attn_implementation=sdpa", "train.autocast=null"])
    assert slow.run_id == explicit.run_id and slow.train_id == explicit.train_id
    machine("cuda", True)
    assert load_config(AUTO).run_id != slow.run_id
    assert load_config([]).run_id == load_config(["train.autocast=bfloat16"]).run_id  # no machine moves a named value


@pytest.mark.parametrize("key", ["model.attn_implementation", "train.autocast"])
def test_one_may_be_chosen_and_the_other_named(machine, key):
    machine("cuda", False)
    config = load_config([f"{key}=auto"])
    found = {"model.attn_implementation": config.model.attn_implementation, "train.autocast": config.train.autocast}
    assert found == {"model.attn_implementation": "eager", "train.autocast": "bfloat16", **{key: found[key]}}
    assert found[key] == {"model.attn_implementation": "sdpa", "train.autocast": None}[key]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.attn_implementation=flash"], "auto or one of eager, sdpa"),
        (["model=t5_tiny", "model.attn_implementation=flash_attention_2"], "sdpa or eager"),
        (["train.autocast=yes"], "bfloat16, auto or null"),
    ],
)
def test_unknown_values_are_refused(overrides, message):
    with pytest.raises(SetupError, match=message):
        load_config(overrides)


def test_flash_attention_that_is_not_installed_is_refused_where_the_run_starts(monkeypatch):
    config = load_config(["model.attn_implementation=flash_attention_2"])
    monkeypatch.setattr(experiments.config, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(SetupError, match="use sdpa"):
        require_means(config)
    monkeypatch.setattr(experiments.config, "is_flash_attn_2_available", lambda: True)
    require_means(config)


@pytest.mark.parametrize("name", ["llama_tiny", "t5_tiny"])
def test_both_attentions_that_may_be_chosen_give_the_same_loss(name, random_rows):
    config = load_config([f"model={name}"]).model
    collator = Collator(config.architecture, 0, 0)
    losses = []
    for attention in ("eager", "sdpa"):
        model = load_model(load_config([f"model={name}", f"model.attn_implementation={attention}"]).model).model
        assert model.config._attn_implementation == attention
        with torch.no_grad():
            losses.append(mean_token_loss(model, collator(random_rows(5))))
    torch.testing.assert_close(*losses)
