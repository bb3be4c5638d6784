"""One rank of a small training under an engine; started by test_engines.py, also called by it for one process.

What a rank found goes to <folder>/<rank>.pt: losses, the factors at the start and at the end, and each gradient that
LoRA-Pro was handed, so that the test can replay its steps with a dense oracle.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import unset_hf_deepspeed_config

from lora_ga.adapters import adapter_pairs, target_linears
from lora_ga.alignment import Alignment
from lora_ga.data.encoding import Collator, EncodedRow, EncodedRows
from lora_ga.engines import Engine, joined, rank, runnable
from lora_ga.gradients import estimate_gradients
from lora_ga.losses import mean_token_loss
from lora_ga.low_rank import Exact, Gradient, Incremental, Sketch
from lora_ga.methods.adalora import AdaLora
from lora_ga.methods.base import Setup
from lora_ga.methods.full_ft import FullFinetune
from lora_ga.methods.lora import Lora
from lora_ga.methods.lora_ga import LoraGA
from lora_ga.methods.lora_one import LoraOne
from lora_ga.methods.pissa import Pissa
from lora_ga.models import ModelSpec, load_model
from lora_ga.optim.lora_pro import LoraProAdamW
from lora_ga.optim.steps import LoraPlus, LoraPro, Scaled
from lora_ga.training import Resume, TrainSettings, train

METHODS = {
    "full_ft": FullFinetune(),
    "lora": Lora(r=4),
    "lora_plus": Lora(r=4, steps=LoraPlus()),
    "pissa": Pissa(r=4),
    "lora_ga": LoraGA(r=4),
    "lora_one": LoraOne(r=4),
    "lora_one_prec": LoraOne(r=4, steps=Scaled()),
    "lora_pro": Lora(r=4, steps=LoraPro()),
    "dora": Lora(r=4, use_dora=True),
    "adalora": AdaLora(r=2, init_r=4),
}
SIZES = {
    "causal": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    },
    "seq2seq": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    },
}
TARGETS = {
    "causal": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "seq2seq": ("q", "k", "v", "o", "wi", "wo"),
}
# 30 rows in global batches of 8: the last is of 6, which two ranks with micro-batches of 2 do not divide.
SETTINGS = TrainSettings(
    learning_rate=5e-3,
    global_batch_size=8,
    per_device_train_batch_size=2,
    max_grad_norm=0.05,
    warmup_ratio=0.0,
    alignment_every=2,
)
UNMEASURED = ("dora", "adalora")  # refused


def rows(count: int) -> list[EncodedRow]:
    """Random rows whose lengths differ."""
    generator = torch.Generator().manual_seed(3)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    return [EncodedRow(ids(3, 12), [*ids(1, 6), 1]) for _ in range(count)]


def spec(architecture: str, dropout: float) -> ModelSpec:
    kind = {"causal": "llama", "seq2seq": "t5"}[architecture]
    return ModelSpec(
        name="small",
        architecture=architecture,  # type: ignore[arg-type]
        source=f"random:{kind}",
        target_modules=TARGETS[architecture],
        config=SIZES[architecture] | ({"dropout_rate": dropout} if architecture == "seq2seq" else {}),
    )


@contextmanager
def handed_to_lora_pro() -> Iterator[list[list[tuple[float, torch.Tensor, torch.Tensor]]]]:
    """Within, each step of LoRA-Pro adds its learning rate and every pair's two gradients."""
    handed: list[list[tuple[float, torch.Tensor, torch.Tensor]]] = []
    step = LoraProAdamW.step

    def watched(self: LoraProAdamW, closure: Any = None) -> Any:
        pairs = zip(self.param_groups[0]["params"][::2], self.param_groups[0]["params"][1::2], strict=True)
        handed.append([(self.param_groups[0]["lr"], A.grad.clone(), B.grad.clone()) for A, B in pairs])
        return step(self, closure)

    LoraProAdamW.step = watched  # type: ignore[method-assign]
    try:
        yield handed
    finally:
        LoraProAdamW.step = step  # type: ignore[method-assign]


def training(
    architecture: str,
    name: str,
    engine: Engine,
    resume: Resume,
    *,
    autocast: str | None = None,
    dropout: float = 0.0,
    epochs: int = 1,
    kept: str | None = None,
) -> dict[str, Any]:
    """Train one method; everything a test compares."""
    unset_hf_deepspeed_config()  # of the training before this one
    method, collator = METHODS[name], Collator(architecture, 0, 0)  # type: ignore[arg-type]
    data = rows(30)
    model = load_model(spec(architecture, dropout), engine).model
    batches = [collator(data[i : i + 3]) for i in range(0, 9, 3)]  # three of them, for two ranks
    layers = target_linears(model, TARGETS[architecture])

    def gradients(k: int) -> dict[str, Gradient]:
        accumulator = {None: Exact, "incremental": lambda: Incremental(k), "sketch": lambda: Sketch(k)}[kept]()
        return estimate_gradients(model, batches, layers, mean_token_loss, seed=0, accumulator=accumulator)

    with runnable(model, engine):
        setup = Setup(target_modules=TARGETS[architecture], gradients=gradients, seed=0, total_steps=4 * epochs)
        prepared = method.prepare(model, setup)
        start = {p.name: (p.lora_A.detach().clone(), p.lora_B.detach().clone()) for p in adapter_pairs(prepared)}
    with handed_to_lora_pro() as handed:
        settings = replace(SETTINGS, autocast=autocast, num_train_epochs=epochs)
        result, moved = train(
            prepared,
            EncodedRows(data),
            collator,
            method,
            settings,
            seed=0,
            resume=resume,
            engine=engine,
            alignment=None if name in UNMEASURED else Alignment(prepared, TARGETS[architecture]),
        )
    return {
        "curve": result.loss_curve,
        "engine": result.engine,
        "moved": moved,
        "start": start,
        "end": {p.name: (p.lora_A.detach().clone(), p.lora_B.detach().clone()) for p in adapter_pairs(prepared)},
        "scaling": [p.scaling for p in adapter_pairs(prepared)],
        "shapes": {name: tuple(parameter.shape) for name, parameter in prepared.named_parameters()},
        "weights": {name: p.detach().clone() for name, p in prepared.named_parameters() if p.requires_grad},
        "optimizer_state_mb": result.optimizer_state_mb,
        "handed": handed,
    }


def of(which: str, engine: Engine, resume: Resume) -> dict[str, Any]:
    """The training "architecture method", with a third word for autocast or for what is kept of the gradient."""
    architecture, name, *more = which.split()
    (word,) = more or [None]
    return training(
        architecture, name, engine, resume, **({"autocast": word} if word == "bfloat16" else {"kept": word})
    )


def main(engine: Engine, wanted: list[str], folder: Path) -> None:
    """Every wanted training, as `of` reads it, one after another."""
    torch.set_num_threads(1)
    with joined(engine):
        found = {}
        for which in wanted:
            found[which] = of(which, engine, Resume(folder / "out"))
        torch.save(found, folder / f"{rank()}.pt")


if __name__ == "__main__":
    kind, stage, where, *trainings = sys.argv[1:]
    main(Engine(name=f"{kind}{stage}", kind=kind, stage=int(stage), nproc=2), trainings, Path(where))  # type: ignore[arg-type]
