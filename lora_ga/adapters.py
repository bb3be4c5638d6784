"""PEFT adapters as matrices: attach them, walk over them, set where they start, hand them out.

Symbols: lora_A (r, d_in), lora_B (d_out, r), forward W x + scaling * lora_B lora_A x (LoRA, arXiv 2106.09685).
A start with a non-zero product (LoRA-GA, PiSSA) must not change the function: its product is taken off again. Where
weights and arithmetic are float32 the weight takes the subtraction itself. In bf16 the shifted weight would round
differently (LoRA-GA's README names that weakness; SmolLM2-135M, gamma 16, loss 5.66: 5.78 with the product folded into
weights used under bf16 autocast, 5.67 this way), so there a second, frozen adapter with its negative runs along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from lora_ga.engines import is_sharded
from lora_ga.errors import SetupError

TRAINED = "default"
OFFSET = "offset"


def _weight(factors: nn.ModuleDict, adapter: str) -> nn.Parameter:
    factor = factors[adapter]
    assert isinstance(factor, nn.Linear) and isinstance(factor.weight, nn.Parameter)
    return factor.weight


@dataclass(frozen=True)
class Pair:
    """One adapted linear: `base` is the frozen nn.Linear under it, `name` its path in the untouched model."""

    name: str
    layer: LoraLayer

    @property
    def lora_A(self) -> nn.Parameter:
        return _weight(self.layer.lora_A, TRAINED)  # (r, d_in)

    @property
    def lora_B(self) -> nn.Parameter:
        return _weight(self.layer.lora_B, TRAINED)  # (d_out, r)

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[TRAINED])

    @property
    def base(self) -> nn.Linear:
        base = self.layer.get_base_layer()
        assert isinstance(base, nn.Linear)
        return base


def target_linears(model: nn.Module, target_modules: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Linears whose last path component is in `target_modules`, by name, in model order.

    A target that names no linear raises SetupError.
    """
    wanted = set(target_modules)
    if not wanted:
        raise SetupError("model.target_modules is empty: name the linear layers to adapt, e.g. [q_proj, v_proj]")
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted
    }
    missing = wanted - {name.rpartition(".")[2] for name in found}
    if missing:
        linears = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        raise SetupError(
            f"model.target_modules {sorted(missing)} name no linear layer of this model; it has {sorted(linears)}"
        )
    return found


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def attach_lora(model: nn.Module, config: LoraConfig, seed: int) -> PeftModel:
    """Wrap the targets of `config` with PEFT's LoRA; its random start depends on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config, adapter_name=TRAINED)


def adapter_pairs(model: nn.Module) -> list[Pair]:
    """Every adapted linear in model order; none without LoRA, nor for AdaLoRA's factors, whose rank changes."""
    prefix = "base_model.model."
    return [
        Pair(name.removeprefix(prefix), module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.lora_A, nn.ModuleDict) and TRAINED in module.lora_A
    ]


@torch.no_grad()
def set_factors(pair: Pair, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
    """Start the pair at lora_A (r, d_in) and lora_B (d_out, r)."""
    pair.lora_A.copy_(lora_A)
    pair.lora_B.copy_(lora_B)


def keep_function(model: PeftModel, *, full_precision: bool) -> None:
    """Take the adapters' present product off the base, so that the model computes what it did before.

    The starting factors stay in the frozen adapter `offset` either way: `export_adapter` needs them. With
    `full_precision` (the forward pass computes in float32) and float32 weights the subtraction is folded into the
    weights and the offset is not computed; elsewhere it is active and costs one more low-rank product a layer.
    """
    pairs = adapter_pairs(model)
    model.add_adapter(OFFSET, model.peft_config[TRAINED])
    fold = full_precision and not is_sharded(model) and all(pair.base.weight.dtype == torch.float32 for pair in pairs)
    with torch.no_grad():
        for pair in pairs:
            _weight(pair.layer.lora_A, OFFSET).copy_(pair.lora_A)
            _weight(pair.layer.lora_B, OFFSET).copy_(-pair.lora_B)
            if fold:
                pair.base.weight -= pair.scaling * (pair.lora_B.float() @ pair.lora_A.float())  # (d_out, d_in)
    assert isinstance(model.base_model, LoraModel)
    model.base_model.set_adapter([TRAINED] if fold else [TRAINED, OFFSET])
    for name, parameter in model.named_parameters():
        if f".{OFFSET}." in name:
            parameter.requires_grad_(False)


def offset_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen factors that `keep_function` left, by name; none without it."""
    return {name: parameter for name, parameter in model.named_parameters() if f".{OFFSET}." in name}


@torch.no_grad()
def move_offset(model: PeftModel, factors: Mapping[str, torch.Tensor]) -> None:
    """Start from these offset factors instead of the present ones, as a resumed training must.

    A start is computed anew when a run resumes, and where that is not exactly reproducible the adapters that were
    trained from the first start would meet a base shifted for the second.
    """
    present = offset_factors(model)
    assert isinstance(model.base_model, LoraModel)
    folded = OFFSET not in model.active_adapters
    for pair in adapter_pairs(model):
        A, B = _weight(pair.layer.lora_A, OFFSET), _weight(pair.layer.lora_B, OFFSET)
        names = {id(parameter): name for name, parameter in present.items()}
        new_A, new_B = factors[names[id(A)]], factors[names[id(B)]]
        if torch.equal(A, new_A) and torch.equal(B, new_B):
            continue
        if folded:
            pair.base.weight -= pair.scaling * (B.float() @ A.float())  # (d_out, d_in)
            pair.base.weight += pair.scaling * (new_B.float() @ new_A.float())  # (d_out, d_in)
        A.copy_(new_A)
        B.copy_(new_B)


def has_offset(model: nn.Module) -> bool:
    """Whether `keep_function` was applied."""
    return isinstance(model, PeftModel) and OFFSET in model.peft_config


def _tensor_pairs(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    for key in state:
        if ".lora_A." in key:
            yield key, key.replace(".lora_A.", ".lora_B.")


def export_adapter(model: PeftModel, folder: Path) -> None:
    """Write a PEFT adapter that gives the trained model on the *untouched* base.

    A start that was taken off the base doubles the rank: scaling * (B A - B_0 A_0) is written as one adapter of rank
    2r whose own scaling is 1 (the factor is folded into lora_B), so any loader of PEFT adapters takes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not has_offset(model):
        model.save_pretrained(str(folder), selected_adapters=[TRAINED])
        return
    config = model.peft_config[TRAINED]
    assert isinstance(config, LoraConfig)
    scaling = adapter_pairs(model)[0].scaling
    trained = get_peft_model_state_dict(model, adapter_name=TRAINED)
    offset = get_peft_model_state_dict(model, adapter_name=OFFSET)
    state: dict[str, torch.Tensor] = {}
    for key_A, key_B in _tensor_pairs(trained):
        state[key_A] = torch.cat([trained[key_A], offset[key_A]]).contiguous()  # (2r, d_in)
        state[key_B] = (scaling * torch.cat([trained[key_B], offset[key_B]], dim=1)).contiguous()  # (d_out, 2r)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {**config.to_dict(), "r": 2 * config.r, "lora_alpha": 2 * config.r, "use_rslora": False}
    LoraConfig.from_peft_type(**{**settings, "inference_mode": True, "init_lora_weights": True}).save_pretrained(
        str(folder)
    )
