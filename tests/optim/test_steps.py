"""Steps build optimizers over exactly the trainable parameters, and refuse models they cannot move."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from lora_ga.adapters import attach_lora
from lora_ga.errors import SetupError
from lora_ga.optim.lora_pro import LoraProAdamW
from lora_ga.optim.scaled_adamw import ScaledAdamW
from lora_ga.optim.steps import AdamW, LoraPlus, LoraPro, Scaled, Steps

ALL = [AdamW(), LoraPlus(), LoraPro(), LoraPro(mode="efficient", X="symmetric", moment_dtype="bfloat16"), Scaled()]


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.v(self.q(x).tanh()).tanh())


def lora_model(**options):
    torch.manual_seed(0)
    return attach_lora(Tiny(), LoraConfig(r=2, lora_alpha=4, target_modules=["q", "v"], **options), seed=0)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("steps", ALL, ids=str)
def test_moves_exactly_the_trainable_parameters_and_lowers_the_loss(steps):
    model = lora_model()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = steps.optimizer(model, learning_rate=1e-2, weight_decay=0.01)
    moved = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in moved} == {id(p) for p in trainable(model)} and len(moved) == 4
    scheduler = get_cosine_schedule_with_warmup(optimizer, 2, 20)
    assert all(group["lr"] == 0 for group in optimizer.param_groups)
    x, y = torch.randn(16, 6), torch.randn(16, 3)
    losses = []
    for _ in range(20):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if not p.requires_grad)


def test_lora_plus_rates_and_weight_decay():
    model = lora_model()
    optimizer = LoraPlus(loraplus_lr_ratio=4.0).optimizer(model, learning_rate=1e-3, weight_decay=0.1)
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert rate[id(p)] == (pytest.approx(4e-3 if "lora_B" in name else 1e-3), 0.1)


def test_settings_reach_the_optimizer():
    model = lora_model(use_rslora=True)
    pro = LoraPro(mode="efficient", X="zero", betas=[0.8, 0.9], eps=1e-6, delta=1e-4, moment_dtype="bfloat16")  # type: ignore[arg-type]
    optimizer = pro.optimizer(model, learning_rate=0.1, weight_decay=0.2)
    assert isinstance(optimizer, LoraProAdamW)
    assert (optimizer.mode, optimizer.X, optimizer.delta) == ("efficient", "zero", 1e-4)
    assert optimizer.moment_dtype == torch.bfloat16
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.1, 0.2, (0.8, 0.9), 1e-6)
    assert [batch.scaling for batch in optimizer.batches] == [pytest.approx(4 / 2**0.5)] * 2
    optimizer.load_state_dict(optimizer.state_dict())  # accelerate does so before the first step
    assert not optimizer.state
    scaled = Scaled(delta=1e-3).optimizer(model, learning_rate=0.1, weight_decay=0.0)
    assert isinstance(scaled, ScaledAdamW) and scaled.delta == 1e-3


@pytest.mark.parametrize("steps", [LoraPro(), Scaled(), LoraPlus()], ids=str)
def test_a_model_without_adapters_is_refused(steps):
    with pytest.raises(SetupError, match="need LoRA adapters; method full_ft has none: use method/steps=adamw"):
        steps.optimizer(Tiny(), learning_rate=1e-3, weight_decay=0.0)


@pytest.mark.parametrize("steps", [LoraPro(), Scaled()], ids=str)
def test_trainable_parameters_outside_the_pairs_are_refused(steps):
    with pytest.raises(SetupError, match="lora_magnitude_vector"):
        steps.optimizer(lora_model(use_dora=True), learning_rate=1e-3, weight_decay=0.0)


def test_unknown_settings_are_refused():
    for wrong in ({"mode": "half"}, {"X": "none"}, {"moment_dtype": "float16"}):
        with pytest.raises(SetupError, match="unknown: use one of"):
            LoraPro(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Steps()  # type: ignore[abstract]


def test_who_needs_whole_matrices():
    assert [type(s).__name__ for s in ALL if s.whole_matrices] == ["LoraPro", "LoraPro", "Scaled"]
