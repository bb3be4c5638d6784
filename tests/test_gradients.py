"""The hooks' one-step gradient is autograd's weight gradient, leaves the model alone, and is cached safely."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_ga.gradients
from lora_ga.adapters import target_linears
from lora_ga.gradients import cached_gradients, estimate_gradients
from lora_ga.losses import mean_token_loss

ARCHITECTURES = ["causal", "seq2seq"]


@pytest.fixture
def problem(tiny, targets, random_rows, collators):
    """A model, its target layers and three micro-batches."""

    def make(architecture, dtype=torch.float32):
        model = tiny(architecture).to(dtype)
        batches = [collators[architecture](random_rows(4, seed)) for seed in range(3)]
        return model, target_linears(model, targets[architecture]), batches

    return make


def autograd(model, batches, names):
    """Weight gradients the ordinary way, on a copy whose weights are not frozen."""
    dense = copy.deepcopy(model).requires_grad_(True)
    for batch in batches:
        mean_token_loss(dense, batch).backward()
    return {name: dense.get_submodule(name).weight.grad / len(batches) for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_autograd_on_frozen_weights(problem, architecture, dtype):
    model, layers, batches = problem(architecture, dtype)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    found = estimate_gradients(model, batches, layers, mean_token_loss, seed=0, dropout=False)
    wanted = autograd(model, batches, layers)
    assert list(found) == list(layers)
    for name, G in found.items():
        assert G.dtype == torch.float32 and G.shape == layers[name].weight.shape
        assert wanted[name].abs().max() > 0
        torch.testing.assert_close(G, wanted[name].float(), rtol=1e-4, atol=1e-7)


def test_is_the_mean_over_micro_batches_and_not_over_tokens(problem):
    model, layers, batches = problem("causal")
    singles = [estimate_gradients(model, [b], layers, mean_token_loss, seed=0, dropout=False) for b in batches]
    together = estimate_gradients(model, batches, layers, mean_token_loss, seed=0, dropout=False)
    for name in layers:
        torch.testing.assert_close(together[name], torch.stack([s[name] for s in singles]).mean(0))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dropout", [True, False])
def test_leaves_no_trace(problem, mode, dropout):
    model, layers, batches = problem("seq2seq")
    model.get_submodule("encoder.final_layer_norm").weight.requires_grad_(True)  # a mixture of frozen and not
    getattr(model, mode)()
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(99)
    state = torch.get_rng_state()

    estimate_gradients(model, batches, layers, mean_token_loss, seed=0, dropout=dropout)

    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert all(module.training is (mode == "train") for module in model.modules())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_leaves_no_trace_when_the_loss_fails(problem):
    model, layers, batches = problem("causal")

    def broken(model, batch):
        mean_token_loss(model, batch)
        raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        estimate_gradients(model, batches, layers, broken, seed=0)
    assert not model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dropout_depends_on_the_seed_alone(problem):
    model, layers, batches = problem("seq2seq")

    def estimate(seed, disturbance, dropout=True):
        torch.manual_seed(disturbance)
        return estimate_gradients(model, batches, layers, mean_token_loss, seed=seed, dropout=dropout)

    first, again, other, without = estimate(0, 1), estimate(0, 2), estimate(5, 1), estimate(0, 1, dropout=False)
    for name in layers:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert not torch.equal(first[name], without[name])


def test_a_layer_the_loss_does_not_see_is_named(problem):
    model, layers, batches = problem("causal")
    unused = {**layers, "stray": torch.nn.Linear(4, 4)}
    with pytest.raises(RuntimeError, match="stray"):
        estimate_gradients(model, batches, unused, mean_token_loss, seed=0)


class Estimate:
    """Counts its calls; every call gives other numbers."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"a": torch.full((3, 2), 0.1) * self.calls, "b": torch.randn(2, 5)}


def test_the_second_call_reads_and_is_bit_equal(tmp_path):
    estimate = Estimate()
    first, cached = cached_gradients({"rows": "x", "seed": 0}, tmp_path / "gradients", estimate)
    assert (cached, estimate.calls) == (False, 1)
    second, cached = cached_gradients({"seed": 0, "rows": "x"}, tmp_path / "gradients", estimate)
    assert (cached, estimate.calls) == (True, 1)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("change", [{"rows": "y"}, {"seed": 1}, {"more": None}])
def test_another_key_estimates_again(tmp_path, change):
    estimate, key = Estimate(), {"rows": "x", "seed": 0}
    first, _ = cached_gradients(key, tmp_path, estimate)
    other, cached = cached_gradients({**key, **change}, tmp_path, estimate)
    assert (cached, estimate.calls) == (False, 2)
    assert not torch.equal(first["a"], other["a"])
    assert torch.equal(cached_gradients(key, tmp_path, estimate)[0]["a"], first["a"])  # the first is still there


def test_without_a_folder_nothing_is_kept():
    estimate = Estimate()
    assert [cached_gradients({}, None, estimate)[1] for _ in range(2)] == [False, False]
    assert estimate.calls == 2


def test_a_crash_while_writing_leaves_nothing_to_read(tmp_path, monkeypatch):
    written = []

    def half(gradients, path):
        save_file(gradients, path)
        path.write_bytes(path.read_bytes()[:-8])
        written.append(path)
        raise OSError("disk full")

    monkeypatch.setattr(lora_ga.gradients, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        cached_gradients({"rows": "x"}, tmp_path, Estimate())
    assert not list(tmp_path.glob("*.safetensors"))
    assert not written[0].name.endswith(".safetensors")

    monkeypatch.undo()
    estimate = Estimate()
    _, cached = cached_gradients({"rows": "x"}, tmp_path, estimate)
    assert (cached, estimate.calls) == (False, 1)
    (stored,) = tmp_path.glob("*.safetensors")
    assert load_file(stored).keys() == {"a", "b"}


def test_two_processes_write_to_two_temporary_files(tmp_path, monkeypatch):
    """Both may estimate the same key at once; sharing one temporary file would mix their bytes."""
    written = []

    def keep_name(gradients, path):
        written.append(path.name)
        save_file(gradients, path)

    monkeypatch.setattr(lora_ga.gradients, "save_file", keep_name)
    for process in (101, 102):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        cached_gradients({"rows": "x"}, tmp_path / str(process), Estimate())
    assert len(set(written)) == 2
