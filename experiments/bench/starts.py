"""LoRA-GA's start of all linears: from factors, from whole matrices, the papers' way and PEFT's, on the same rows.

Plain is what Outsider565/LoRA-GA's run_exp.py does, in our own words: every weight gets a gradient, hooks add the
target layers' up on the CPU and drop all, then torch.svd_lowrank (q = 4r, 4 iterations) layer by layer. PEFT is its
`preprocess_loraga` and `init_lora_weights="lora_ga"`. Both compute the loss as the model does, from all positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from experiments.bench.measure import Measured, measure
from experiments.config import RunConfig, load_config
from experiments.rows import Encoded, Rows
from experiments.stages import Gradients
from lora_ga.adapters import TRAINED, adapter_pairs, attach_lora, set_factors, target_linears
from lora_ga.gradients import estimate_gradients
from lora_ga.losses import mean_token_loss
from lora_ga.low_rank import Accumulator, Gradient, LowRank
from lora_ga.methods.base import Setup
from lora_ga.methods.lora_ga import LoraGA
from lora_ga.methods.svd import EXACT
from lora_ga.models import Loaded, load_model
from lora_ga.precast import precast

# T5-Base's and a 1.1-billion-parameter Llama's shapes (TinyLlama's), with random weights and the local tokenizer.
T5_BASE = [
    "model=t5_tiny",
    *(
        f"model.config.{k}={v}"
        for k, v in {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}.items()
    ),
]
LLAMA_1B = [
    "model=llama_tiny",
    "model.dtype=bfloat16",
    *(
        f"model.config.{k}={v}"
        for k, v in {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        }.items()
    ),
]
Batch = dict[str, torch.Tensor]


def _config(overrides: Sequence[str]) -> RunConfig:
    return load_config(["method=lora_ga", "train.gradient.cache=false", *overrides])


def case(overrides: Sequence[str]) -> tuple[RunConfig, Gradients]:
    """A LoRA-GA run's configuration, its model and its rows."""
    config = _config(overrides)
    loaded = load_model(config.model)
    for parameter in loaded.model.parameters():
        parameter.sum()  # what is mapped from a file is read when it is first touched: it is not of the start
    return config, Gradients(config, loaded, Encoded.of(config, loaded, Rows.load(config)))


def ours(overrides: Sequence[str]) -> Measured:
    """The start as a run makes it."""
    config, gradients = case(overrides)
    setup = Setup(
        target_modules=config.model.target_modules,
        gradients=gradients,
        seed=0,
        total_steps=1,
        full_precision=config.train.autocast is None,
    )
    return measure(lambda: config.method.prepare(gradients.loaded.model, setup))


class _Sizes(Accumulator):
    """Keeps of each product D^T X no more than its size: (tokens, d_out, d_in), in the order they come."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int, int]] = []

    def add(self, name: str, D: torch.Tensor, X: torch.Tensor) -> None:
        self.sizes.append((len(X), *self.shapes[name]))

    def end_pass(self) -> None: ...

    def result(self) -> dict[str, Gradient]:
        return {}


def _passes(config: RunConfig, gradients: Gradients, layers: Mapping[str, nn.Linear]) -> list[tuple[int, int, int]]:
    batches, shares = gradients.batches()
    model, autocast, found = gradients.loaded.model, config.train.autocast_dtype, _Sizes()
    with precast(model, autocast):
        estimate_gradients(
            model,
            batches,
            layers,
            lambda model, batch: mean_token_loss(model, batch, autocast),
            seed=0,
            shares=shares,
            accumulator=found,
        )
    return found.sizes


def passes_alone(overrides: Sequence[str]) -> Measured:
    """The forward and backward passes behind our start, whose limit they are: no gradient is kept, nothing started."""
    config, gradients = case(overrides)
    layers = target_linears(gradients.loaded.model, config.model.target_modules)
    return measure(lambda: _passes(config, gradients, layers))


def multiplications(overrides: Sequence[str]) -> Measured:
    """The matrix products of those passes and nothing else: every linear's forward and back to its input."""
    config, gradients = case(overrides)
    linears = {n: m for n, m in gradients.loaded.model.named_modules() if isinstance(m, nn.Linear)}
    sizes = _passes(config, gradients, linears)

    @cache
    def some(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=config.train.autocast_dtype or torch.float32)

    operands = [(some(T, d_in), some(d_out, d_in), some(T, d_out)) for T, d_out, d_in in sizes]

    def work() -> None:
        for X, W, D in operands:
            X @ W.mT
            D @ W

    return measure(work)


def _whole_loss(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> torch.Tensor:
    """Mean loss from the logits of all positions; our labels are shifted already."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = model(**inputs).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())


def plain(overrides: Sequence[str]) -> Measured:
    """Whole gradients of all weights, then a decomposition a layer."""
    config, gradients = case(overrides)
    method = config.method
    assert isinstance(method, LoraGA)
    return measure(lambda: _plain_start(config, method, gradients.loaded, gradients.batches()[0]))


def _plain_start(config: RunConfig, method: LoraGA, loaded: Loaded, batches: Sequence[Batch]) -> nn.Module:
    model, r = loaded.model, method.r
    layers = target_linears(model, config.model.target_modules)
    totals: dict[int, torch.Tensor] = {id(layer.weight): torch.zeros_like(layer.weight) for layer in layers.values()}

    def collect(parameter: torch.Tensor) -> None:
        if id(parameter) in totals and parameter.grad is not None:
            totals[id(parameter)] += parameter.grad.to("cpu")
        parameter.grad = None

    model.requires_grad_(True).train()
    hooks = [parameter.register_post_accumulate_grad_hook(collect) for parameter in model.parameters()]
    for batch in batches:
        _whole_loss(model, batch, config.train.autocast_dtype).backward()
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    found = {name: totals[id(layer.weight)] / len(batches) for name, layer in layers.items()}
    adapted = attach_lora(model, method.peft_config(Setup(config.model.target_modules, dict, 0, 1)), 0)  # type: ignore[arg-type]
    for pair in adapter_pairs(adapted):
        U, _, V = torch.svd_lowrank(found[pair.name].float(), q=min(4 * r, *found[pair.name].shape), niter=4)
        scale = U.shape[0] ** 0.25 / method.stable_gamma**0.5
        set_factors(pair, scale * V[:, :r].T, scale * U[:, r : 2 * r])
        pair.base.weight.data -= pair.scaling * (pair.lora_B.data @ pair.lora_A.data)
    return adapted


def peft(overrides: Sequence[str]) -> Measured:
    """PEFT's own gradient estimate and start."""
    config, gradients = case(overrides)
    method = config.method
    assert isinstance(method, LoraGA)
    lora = LoraConfig(
        r=method.r,
        lora_alpha=int(method.lora_alpha),
        use_rslora=True,
        target_modules=list(config.model.target_modules),
        init_lora_weights="lora_ga",  # type: ignore[arg-type]  # not in the annotation of this release
        lora_ga_config=LoraGAConfig(stable_gamma=int(method.stable_gamma)),
    )
    model, batches = gradients.loaded.model, gradients.batches()[0]

    def train_step() -> None:
        for batch in batches:
            _whole_loss(model, batch, config.train.autocast_dtype).backward()

    def start() -> Any:
        preprocess_loraga(model, lora, train_step)
        return get_peft_model(model, lora, adapter_name=TRAINED)

    return measure(start)


def kept_energy(overrides: Sequence[str], way: Sequence[str]) -> Measured:
    """How much of the best rank-2r energy of the exact gradient the start's 2r directions hold, by layer."""
    config, gradients = case(overrides)
    method = config.method
    assert isinstance(method, LoraGA)
    exact = gradients(4 * method.r)
    gradients.config = _config([*overrides, *way])
    return measure(
        lambda: gradients(4 * method.r),
        facts=lambda found: _shares(exact, found, 2 * method.r),
    )


def _shares(exact: Mapping[str, Gradient], found: Mapping[str, Gradient], k: int) -> dict[str, float]:
    """Least and median over layers of the energy share, and the largest principal angle of the leading k/2, degrees."""
    shares, angles = [], []
    for name, G in exact.items():
        factors = found[name]
        assert isinstance(G, torch.Tensor) and isinstance(factors, LowRank)
        best_U, S, best_Vh = EXACT(G, k)
        U, _, Vh = EXACT(factors, k)
        held = min(float((U.mT @ G).square().sum()), float((G @ Vh.mT).square().sum()))
        shares.append(held / float(S.square().sum()))
        half = k // 2
        cosines = torch.stack(
            [torch.linalg.svdvals(best_U[:, :half].mT @ U).min(), torch.linalg.svdvals(best_Vh[:half] @ Vh.mT).min()]
        )
        angles.append(float(torch.rad2deg(torch.acos(cosines.clamp(max=1))).max()))
    share, angle = torch.tensor(shares), torch.tensor(angles)
    return {
        "least_share": float(share.min()),
        "median_share": float(share.median()),
        "median_largest_angle": float(angle.median()),
    }
