"""Proves that models come from where the configuration says, with an identity that follows their weights."""

from pathlib import Path

import pytest
import torch

from experiments.config import load_config
from lora_ga import models
from lora_ga.errors import SetupError
from lora_ga.models import ModelSpec, load_model, target_shapes


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return load_config(["model=llama_tiny"]).model


def test_shapes_match_the_loaded_layers(spec: ModelSpec) -> None:
    model = load_model(spec).model
    shapes = target_shapes(spec)
    assert len(shapes) == 2 * 7
    assert all(tuple(model.get_submodule(name).weight.shape) == shape for name, shape in shapes.items())


def test_shapes_leave_the_meta_device_before_anything_is_read(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading a configuration may convert the local asset, which cannot be done on the meta device.
    read = models._config

    def watched(asked: ModelSpec) -> object:
        assert torch.empty(1).device.type == "cpu"
        return read(asked)

    monkeypatch.setattr(models, "_config", watched)
    assert target_shapes(spec)


def test_random_weights_do_not_depend_on_what_ran_before(spec: ModelSpec) -> None:
    first = load_model(spec)
    torch.randn(7)
    again = load_model(spec)
    assert first.identity == again.identity
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_folder_gives_the_same_model_and_its_identity_follows_the_weights(spec: ModelSpec, tmp_path: Path) -> None:
    loaded = load_model(spec)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    folder = ModelSpec(
        name="copy", architecture="causal", source=str(tmp_path), target_modules=tuple(spec.target_modules)
    )
    copy = load_model(folder)
    ids = torch.arange(10, 20)[None]
    torch.testing.assert_close(copy.model(input_ids=ids).logits, loaded.model(input_ids=ids).logits)
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1)
    loaded.model.save_pretrained(tmp_path)
    assert load_model(folder).identity != copy.identity


def test_decoding_settings_of_a_checkpoint_are_dropped(spec: ModelSpec, tmp_path: Path) -> None:
    loaded = load_model(spec)
    loaded.model.generation_config.update(do_sample=True, temperature=0.6)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    folder = ModelSpec(name="copy", architecture="causal", source=str(tmp_path), target_modules=("q_proj",))
    kept = load_model(folder).model.generation_config
    assert not kept.do_sample and kept.temperature in (None, 1.0)


def test_missing_folder_is_one_line() -> None:
    lost = ModelSpec(name="x", architecture="causal", source="./no/such/folder", target_modules=("q_proj",))
    with pytest.raises(SetupError, match="no such folder"):
        load_model(lost)
